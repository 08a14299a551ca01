"""What one sending end asks of the receiving end: the destination pool, the library's receiver, and verification.

Each `do_...` answers one request of the same name, in the receiving process's main thread. The session owns the pool.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from pdxfer.bench.ceiling import SharedTarget, StreamSink
from pdxfer.bench.channel import Channel, Message
from pdxfer.bench.cuda import Cuda, DeviceBuffer
from pdxfer.bench.device_ceiling import PinnedCopies
from pdxfer.bench.errors import BenchError, describe
from pdxfer.bench.memory import Content, Pool, allocate, available_memory, fill_guard, machine
from pdxfer.bench.movers import Options, Receiver, make_receiver
from pdxfer.bench.verify import Sample, verify
from pdxfer.bench.workloads import Geometry, Pages, make_pages, pages_digest, workload_from_json

IDLE_SECONDS = 600.0  # the sending end asks at least this often, even while it waits for a slow library


class Session:
    """What one sending end asked for. Each `do_...` answers one request of the same name."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._pool: Pool = []
        self._content: Content | None = None
        self._receiver: Receiver | None = None
        self._geometry: Geometry | None = None
        self._pages: tuple[Pages, Pages] | None = None
        self._sample: Sample | None = None
        self._target: SharedTarget | None = None
        self._sink: StreamSink | None = None
        self._cuda: Cuda | None = None
        self._peer_target: DeviceBuffer | None = None
        self._pinned: PinnedCopies | None = None

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

    def do_device(self, ordinal: int) -> Message:
        """Take a GPU for the pools to come."""
        if self._cuda is None or self._cuda.ordinal != ordinal:
            self._cuda = Cuda(ordinal)
        free, total = self._cuda.memory()
        return {"name": self._cuda.name(), "free": free, "total": total}

    def do_pool(self, workload: dict[str, Any], device: int | None = None) -> Message:
        """Make the destination pool and fill it with guard; an earlier pool is given back first."""
        self._drop_pool()
        if device is not None:
            self.do_device(device)
        work = workload_from_json(workload)
        geometry = work.geometry()
        self._pool = allocate(geometry.buffers, geometry.dst_buffer, None if device is None else self._cuda)
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
        prepare = getattr(self._receiver, "prepare", None)
        if prepare is not None:
            prepare(self._geometry, *pages)
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

    def do_peer_target(self, bytes: int) -> Message:
        """Memory of this GPU for the sending end's copy engine."""
        assert self._cuda is not None
        if self._peer_target is None:
            self._peer_target = self._cuda.allocate(bytes)
        return {"handle": self._cuda.share(self._peer_target.pointer)}

    def do_pinned_seconds(self) -> Message:
        assert self._cuda is not None
        if self._pinned is None:
            self._pinned = PinnedCopies(self._cuda)
        return {"to_device": self._pinned.to_device()}

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
