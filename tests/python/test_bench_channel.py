"""The bench's control channel: the challenge, other versions, strangers, silence, and ports."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

from pdxfer.bench import channel as channel_module
from pdxfer.bench.channel import Channel, connect, listen, parse_address, welcome
from pdxfer.bench.errors import BenchError


class Listener:
    """A listening end in a thread: `result` is the channel, or the error that it refused with."""

    def __init__(self, serve: Callable[[socket.socket], object]) -> None:
        self._sock = listen("127.0.0.1:0")
        self.address = f"127.0.0.1:{self._sock.getsockname()[1]}"
        self.result: object = None
        self._thread = threading.Thread(target=self._run, args=(serve,))
        self._thread.start()

    def _run(self, serve: Callable[[socket.socket], object]) -> None:
        accepted, _ = self._sock.accept()
        try:
            self.result = serve(accepted)
        except BenchError as error:
            self.result = error

    def join(self) -> object:
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._sock.close()
        return self.result


def with_secret(secret: str) -> Callable[[socket.socket], Channel]:
    return lambda sock: welcome(sock, "a test", secret, "1.0", timeout=2.0)


@pytest.mark.parametrize("secret", ["", "s3cret"])
def test_ends_that_agree_can_talk(secret: str) -> None:
    listener = Listener(with_secret(secret))
    ours = connect(listener.address, secret, "1.0")
    theirs = listener.join()
    assert isinstance(theirs, Channel)
    theirs.send({"answer": 42})
    assert ours.call("question") == {"answer": 42}
    assert theirs.receive(1.0) == {"do": "question"}
    theirs.send({"error": "it broke"})
    with pytest.raises(BenchError, match="it broke"):
        ours.call("again")
    theirs.close()
    with pytest.raises(BenchError, match="closed the connection|gone|lost"):
        ours.call("more")
    ours.close()


@pytest.mark.parametrize(("ours", "theirs"), [("a", "b"), ("a", ""), ("", "b")])
def test_another_secret_is_refused_on_both_ends(ours: str, theirs: str) -> None:
    listener = Listener(with_secret(theirs))
    with pytest.raises(BenchError, match="wrong secret"):
        connect(listener.address, ours, "1.0")
    assert "wrong secret" in str(listener.join())


def test_a_listener_without_the_secret_is_not_trusted() -> None:
    def impostor(sock: socket.socket) -> None:
        channel = Channel(sock, "test")
        channel.receive(2.0)
        channel.send({"hello": "pdxfer-bench", "protocol": 1, "version": "1.0", "nonce": "00"})
        channel.receive(2.0)
        channel.send({"proof": "0" * 64})

    listener = Listener(impostor)
    with pytest.raises(BenchError, match="another secret"):
        connect(listener.address, "s3cret", "1.0")
    listener.join()


def test_another_version_is_named() -> None:
    def old(sock: socket.socket) -> None:
        channel = Channel(sock, "test")
        channel.receive(2.0)
        channel.send({"hello": "pdxfer-bench", "protocol": 9, "version": "7.0", "nonce": "00"})
        sock.recv(1)

    listener = Listener(old)
    with pytest.raises(BenchError, match=r"protocol 9 \(pdxfer 7.0\).*same version"):
        connect(listener.address, "", "1.0")
    listener.join()


def test_another_version_is_told_what_we_are() -> None:
    listener = Listener(with_secret(""))
    host, port = parse_address(listener.address)
    with socket.create_connection((host, port)) as sock:
        channel = Channel(sock, "test")
        channel.send({"hello": "pdxfer-bench", "protocol": 9, "version": "7.0", "nonce": "00"})
        assert "protocol 9 (pdxfer 7.0), this end 1" in channel.receive(2.0)["error"]
    assert isinstance(listener.join(), BenchError)


def test_nobody_listens() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(BenchError, match="refused.*--listen"):
        connect(address, "", "1.0")


def test_port_in_use() -> None:
    with listen("127.0.0.1:0") as sock, pytest.raises(BenchError, match="in use.*another port"):
        listen(f"127.0.0.1:{sock.getsockname()[1]}")


@pytest.mark.parametrize(
    "stranger",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        struct.pack("!I", 0xFFFFFFFF),
        struct.pack("!I", 4) + b"nope",
        struct.pack("!I", 2) + b"[]",
        struct.pack("!I", 2) + b"{}",
        struct.pack("!I", 4) + b"\xff\xfe\xfd\xfc",
        struct.pack("!I", 200) + b'{"hello": "pdxfer-bench", "protocol": 1, "nonce": 5}'.ljust(200),
    ],
)
def test_strangers_are_turned_away(stranger: bytes) -> None:
    listener = Listener(with_secret("x"))
    host, port = parse_address(listener.address)
    with socket.create_connection((host, port)) as sock:
        sock.sendall(stranger)
        assert isinstance(listener.join(), BenchError)


def test_silence_has_a_bound() -> None:
    begin = time.monotonic()
    listener = Listener(lambda sock: welcome(sock, "a test", "x", "1.0", timeout=0.3))
    host, port = parse_address(listener.address)
    with socket.create_connection((host, port)):
        assert "no answer" in str(listener.join())
    assert time.monotonic() - begin < 5


def test_a_slow_sender_does_not_stretch_the_bound() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("!I", 100) + b"x" * 10)
        channel = Channel(ours, "a slow peer")
        begin = time.monotonic()
        with pytest.raises(BenchError, match="no answer"):
            channel.receive(0.3)
        assert time.monotonic() - begin < 3


def test_messages_have_a_limit() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(BenchError, match="too long"):
        Channel(ours, "test").send({"x": "y" * channel_module.MAX_MESSAGE})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.2:99", ("10.0.0.2", 99)),
        ("[::1]:99", ("::1", 99)),
        ("host", ("host", 4790)),
        (":99", ("", 99)),
        ("::1", ("::1", 4790)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["host:port", "host:99999", "[::1]:x"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(BenchError, match="HOST:PORT"):
        parse_address(text)
