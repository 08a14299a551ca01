"""The receiving end: a process that owns the destination pool and does what the sending end asks over the channel.

`python -m pdxfer.bench.remote FD` serves one session on an inherited, already authenticated socket, then exits; a
fresh process per session keeps one library's crash, environment and threads away from the next. It ends when the
channel does, so it never outlives the sending end.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from pdxfer.bench.ceiling import SharedTarget, StreamSink
from pdxfer.bench.channel import Channel, Message
from pdxfer.bench.errors import BenchError, EndGone
from pdxfer.bench.memory import ByteArray, Content, allocate, available_memory, fill_guard, machine
from pdxfer.bench.movers import Options, Receiver, make_receiver
from pdxfer.bench.verify import Sample, verify
from pdxfer.bench.workloads import Geometry, Pages, make_pages, pages_digest, workload_from_json

IDLE_SECONDS = 600.0  # the sending end asks at least this often, even while it waits for a slow library


class Session:
    """What one sending end asked for. Each `do_...` answers one request of the same name."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._pool: list[ByteArray] = []
        self._content: Content | None = None
        self._receiver: Receiver | None = None
        self._geometry: Geometry | None = None
        self._pages: tuple[Pages, Pages] | None = None
        self._sample: Sample | None = None
        self._target: SharedTarget | None = None
        self._sink: StreamSink | None = None

    def serve(self) -> None:
        """Answer until the sending end says goodbye or goes away."""
        while True:
            request = self._channel.receive(IDLE_SECONDS)
            name = str(request.pop("do", ""))
            if name == "goodbye":
                self._channel.send({})
                return
            handler: Callable[..., Message] | None = getattr(self, f"do_{name}", None)
            if handler is None:
                self._channel.send({"error": f"request {name!r} is not known to this version"})
                continue
            try:
                answer = handler(**request)
            except Exception as error:  # told to the sending end, which decides what to do about it
                answer = {"error": describe(error)}
            self._channel.send(answer)

    def do_hello(self) -> Message:
        return {"available": available_memory(), "machine": machine(), "numpy": np.__version__, "pid": os.getpid()}

    def do_pool(self, workload: dict[str, Any]) -> Message:
        """Make the destination pool and fill it with guard; an earlier pool is given back first."""
        self._drop_pool()
        work = workload_from_json(workload)
        geometry = work.geometry()
        self._pool = allocate(geometry.buffers, geometry.dst_buffer)
        fill_guard(self._pool)
        self._content = Content(work.seed, geometry.src_buffer, geometry.buffers)
        return {}

    def do_open(self, library: str, options: dict[str, Any]) -> Message:
        self.do_close()
        self._receiver = make_receiver(library, Options(**{**options, "host": self._channel.local_host()}))
        return {"remote": self._receiver.open(self._pool)}

    def do_close(self) -> Message:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
        return {}

    def do_row(self, workload: dict[str, Any], digest: int) -> Message:
        work = workload_from_json(workload)
        if self._content is None:
            raise BenchError("no pool has been made yet")
        pages = make_pages(work)
        if pages_digest(*pages) != digest:
            raise BenchError(
                f"both ends made different page lists from the same seed (NumPy {np.__version__} here): install the "
                "same NumPy on both"
            )
        self._geometry, self._pages = work.geometry(), pages
        self._sample = Sample(self._pool, self._geometry, pages, self._content)
        return {}

    def do_spoil(self) -> Message:
        assert self._sample is not None
        self._sample.spoil()
        return {}

    def do_arrived(self, number: int, check: bool) -> Message:
        """After a transfer completed at the sender: were we told, and are the sampled bytes here?"""
        assert self._sample is not None and self._receiver is not None
        wrong = self._sample.check() if check else None
        self._receiver.arrived(number)
        return {"wrong": wrong}

    def do_verify(self) -> Message:
        assert self._geometry is not None and self._pages is not None and self._content is not None
        return {"wrong": verify(self._pool, self._geometry, *self._pages, self._content)}

    def do_reset(self) -> Message:
        fill_guard(self._pool)
        return {}

    def do_memcpy_target(self, bytes: int) -> Message:
        if self._target is None or self._target.bytes < bytes:
            self._drop_target()
            self._target = SharedTarget(bytes)
        return {"path": self._target.path()}

    def do_stream_sink(self) -> Message:
        if self._sink is None:
            self._sink = StreamSink(self._channel.local_host())
        return {"port": self._sink.port}

    def _drop_target(self) -> None:
        if self._target is not None:
            self._target.close()
            self._target = None

    def _drop_pool(self) -> None:
        self.do_close()
        self._drop_target()
        self._pool, self._content, self._sample = [], None, None

    def close(self) -> None:
        self._drop_pool()
        if self._sink is not None:
            self._sink.close()


def describe(error: BaseException) -> str:
    """One line for a row or the other end: the bench's own errors as they are, others with their type."""
    text = " ".join(str(error).split()) or "no text"
    return text if isinstance(error, BenchError) else f"{type(error).__name__}: {text}"


def spawn(sock: socket.socket, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process that serves one session on `sock`, which stays the caller's to close. stdout goes to stderr."""
    return subprocess.Popen(
        [sys.executable, "-m", "pdxfer.bench.remote", str(sock.fileno())],
        pass_fds=[sock.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        env={**os.environ, **environment},
    )


def main(argv: list[str]) -> int:
    sock = socket.socket(fileno=int(argv[0]))
    channel = Channel(sock, "the sending end")
    session = Session(channel)
    try:
        session.serve()
    except EndGone:
        return 0  # the end of an interrupted run; the sending end says what there is to say
    except BenchError as error:
        print(f"pdxfer bench (receiving end): {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        session.close()
        channel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
