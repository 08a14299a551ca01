"""The control channel between the two ends: small JSON messages with a length in front, over any stream socket.

The sending end asks, the receiving end answers; nothing that is measured goes through here. Between machines the
channel opens with a versioned challenge that proves on both sides that they were given the same secret. Every wait
has a bound, no message may be longer than a mebibyte, and nothing that arrives is executed or unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from typing import Any

from pdxfer.bench.errors import BenchError, EndGone

PROTOCOL = 1
MAX_MESSAGE = 1 << 20
HELLO_SECONDS = 10.0
_MAX_HELLO = 1 << 12
_NAME = "pdxfer-bench"

Message = dict[str, Any]


class Channel:
    """One end of the control channel. Owns the socket; not for several threads at once."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.socket = sock
        self.peer = peer  # who is there, for error texts

    def send(self, message: Message, timeout: float = 30.0) -> None:
        payload = json.dumps(message).encode()
        if len(payload) > MAX_MESSAGE:
            raise BenchError(f"a message of {len(payload)} bytes for {self.peer} is too long")
        self.socket.settimeout(timeout)
        try:
            self.socket.sendall(struct.pack("!I", len(payload)) + payload)
        except TimeoutError:
            raise BenchError(f"{self.peer} took nothing for {timeout:g} s") from None
        except OSError as error:
            raise EndGone(f"{self.peer} is gone: {error.strerror or error}") from None

    def receive(self, timeout: float, limit: int = MAX_MESSAGE) -> Message:
        """The next message.

        Raises:
            BenchError: none within `timeout` seconds, the other end closed, or it speaks something else.
        """
        deadline = time.monotonic() + timeout
        (size,) = struct.unpack("!I", self._exactly(4, deadline, timeout))
        if size > limit:
            raise BenchError(f"{self.peer} does not speak the bench protocol (a message of {size} bytes)")
        try:
            message = json.loads(self._exactly(size, deadline, timeout))
        except (UnicodeDecodeError, ValueError):
            raise BenchError(f"{self.peer} does not speak the bench protocol (not JSON)") from None
        if not isinstance(message, dict):
            raise BenchError(f"{self.peer} does not speak the bench protocol (not an object)")
        return message

    def _exactly(self, count: int, deadline: float, timeout: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self.socket.settimeout(max(1e-3, deadline - time.monotonic()))
            try:
                piece = self.socket.recv(count - len(data))
            except TimeoutError:
                raise BenchError(f"no answer from {self.peer} within {timeout:g} s") from None
            except OSError as error:
                raise EndGone(f"lost {self.peer}: {error.strerror or error}") from None
            if not piece:
                raise EndGone(f"{self.peer} closed the connection")
            data += piece
        return bytes(data)

    def call(self, request: str, timeout: float = 60.0, **fields: Any) -> Message:
        """Ask and wait for the answer. An answer that carries an error becomes a BenchError."""
        self.send({"do": request, **fields})
        answer = self.receive(timeout)
        if "error" in answer:
            raise BenchError(f"{self.peer}: {answer['error']}")
        return answer

    def local_host(self) -> str:
        """Our address on the route to the peer: where it can reach sockets that we open."""
        return _host(self.socket.getsockname()) if self.socket.family != socket.AF_UNIX else "127.0.0.1"

    def peer_host(self) -> str:
        return _host(self.socket.getpeername()) if self.socket.family != socket.AF_UNIX else "127.0.0.1"

    def close(self) -> None:
        self.socket.close()


def _host(name: Any) -> str:
    host = str(name[0])
    return host[len("::ffff:") :] if host.startswith("::ffff:") else host


def parse_address(text: str, default_port: int = 4790) -> tuple[str, int]:
    """ "host:port", "[v6]:port", "host" or ":port"; an empty host means every address when listening.

    Raises:
        BenchError: the port is not a number up to 65535.
    """
    host, port = text, str(default_port)
    if text.startswith("["):
        host, _, rest = text[1:].partition("]")
        port = rest[1:] if rest.startswith(":") else port
    elif text.count(":") == 1:
        host, port = text.split(":")
    if not port.isdigit() or int(port) > 65535:
        raise BenchError(f"address {text!r}: expected HOST:PORT or [IPV6]:PORT")
    return host, int(port)


def listen(address: str) -> socket.socket:
    """A listening TCP socket.

    Raises:
        BenchError: the port is in use, or the address is not of this machine.
    """
    host, port = parse_address(address)
    try:
        family, _, _, _, name = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(name)
            sock.listen(8)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise BenchError(f"--listen {address}: {error.strerror or error}; give another port or address") from None
    return sock


def connect(address: str, secret: str, version: str, timeout: float = HELLO_SECONDS, program: str = "bench") -> Channel:
    """A channel to a listening bench, after the challenge.

    Raises:
        BenchError: nobody listens there, another version, another secret, or something that is not a bench.
    """
    host, port = parse_address(address)
    try:
        sock = socket.create_connection((host or "localhost", port), timeout=timeout)
    except OSError as error:
        raise BenchError(
            f"--connect {address}: {error.strerror or error}; is `pdxfer {program} --listen` running there?"
        ) from None
    channel = Channel(sock, f"the {program} at {address}")
    try:
        _greet(channel, secret, version, timeout)
    except BaseException:
        channel.close()
        raise
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return channel


def welcome(sock: socket.socket, peer: str, secret: str, version: str, timeout: float = HELLO_SECONDS) -> Channel:
    """The listening side of `connect`. Refusals are told to the other end, then raised."""
    channel = Channel(sock, peer)
    try:
        hello = channel.receive(timeout, _MAX_HELLO)
        _check_hello(channel, hello)
        nonce = secrets.token_hex(16)
        nonces = f"{hello['nonce']}|{nonce}"
        channel.send({"hello": _NAME, "protocol": PROTOCOL, "version": version, "nonce": nonce})
        proof = channel.receive(timeout, _MAX_HELLO).get("proof")
        if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(), _proof(secret, "connect", nonces)):
            raise BenchError("wrong secret: start both ends with the same --secret")
        channel.send({"proof": _proof(secret, "listen", nonces).decode()})
    except BenchError as error:
        with contextlib.suppress(BenchError):  # already gone; the first error is the one to report
            channel.send({"error": str(error)}, timeout=1.0)
        channel.close()
        raise
    return channel


def _greet(channel: Channel, secret: str, version: str, timeout: float) -> None:
    nonce = secrets.token_hex(16)
    channel.send({"hello": _NAME, "protocol": PROTOCOL, "version": version, "nonce": nonce})
    hello = _answer(channel, timeout)
    _check_hello(channel, hello)
    nonces = f"{nonce}|{hello['nonce']}"
    channel.send({"proof": _proof(secret, "connect", nonces).decode()})
    proof = _answer(channel, timeout).get("proof")
    if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(), _proof(secret, "listen", nonces)):
        raise BenchError(f"{channel.peer} was given another secret")


def _answer(channel: Channel, timeout: float) -> Message:
    answer = channel.receive(timeout, _MAX_HELLO)
    if "error" in answer:
        raise BenchError(f"{channel.peer} refused: {answer['error']}")
    return answer


def _check_hello(channel: Channel, hello: Message) -> None:
    if hello.get("hello") != _NAME or not isinstance(hello.get("nonce"), str):
        raise BenchError(f"{channel.peer} is not a pdxfer bench")
    if hello.get("protocol") != PROTOCOL:
        raise BenchError(
            f"{channel.peer} speaks bench protocol {hello.get('protocol')} (pdxfer {hello.get('version')}), this end "
            f"{PROTOCOL}: install the same version on both"
        )


def _proof(secret: str, role: str, nonces: str) -> bytes:
    return hmac.new(secret.encode(), f"{_NAME}|{role}|{nonces}".encode(), hashlib.sha256).hexdigest().encode()
