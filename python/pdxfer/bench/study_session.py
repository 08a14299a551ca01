"""The receiving end's part of the studies: watch arrivals, send back, copy, compute. See bench/studies.py.

`StudySession` is a `Session` with more requests; the sending end makes one of its own, without a channel to serve, as
the destination of the second direction.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pdxfer.bench.channel import Message
from pdxfer.bench.cuda import Cuda
from pdxfer.bench.errors import BenchError
from pdxfer.bench.load import Compute, Repeated
from pdxfer.bench.memory import Content, allocate, fill_source
from pdxfer.bench.movers import Options, make_receiver, make_sender
from pdxfer.bench.own import OwnReceiver
from pdxfer.bench.session import Session
from pdxfer.bench.workloads import make_pages, workload_from_json

COPY_BYTES = 1 << 30
# Requests under way in each direction: a link that waits for the next one to be planned and told of is not full.
DUPLEX_AT_ONCE = 2


class CopyLoop:
    """Copies of 1 GiB from this GPU into the other process's CopyLoop."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.bytes = cuda, COPY_BYTES
        self._source, self._own_target = cuda.allocate(COPY_BYTES), cuda.allocate(COPY_BYTES)
        some = np.random.default_rng(1).integers(0, 256, COPY_BYTES >> 5, dtype=np.uint8)  # as heavy as a KV cache
        for at in range(0, COPY_BYTES, some.nbytes):
            cuda.upload(self._source.pointer + at, some)
        self.handle = cuda.share(self._own_target.pointer)
        self._target = 0
        self.loop = Repeated(self._copy, cuda.attach)

    def open(self, handle: str) -> None:
        self._target = self._cuda.open(handle)
        self._copy(0)

    def _copy(self, number: int) -> None:
        self._cuda.copy_seconds(self._target, self._source.pointer, self.bytes)

    def close(self) -> None:
        if self._target != 0:  # else it was copied to alone
            self._cuda.close_shared(self._target)
        del self._source, self._own_target


class StudySession(Session):
    """Answers the table's requests and the studies'."""

    _compute: Compute | None = None
    _copies: CopyLoop | None = None
    _load: Repeated | None = None
    _back: Any = None
    _back_pool: Any = None
    remote: dict[str, Any]

    def options_back(self, options: Options) -> dict[str, Any]:
        """`options` as the other end needs them to send to this one; the secret it has."""
        return {
            "transport": options.transport,
            "settings": options.settings,
            "memory": options.memory,
            "device": options.remote_device,
            "remote_device": options.device,
            "isolate": options.isolate,
        }

    def open_own(self, options: Options) -> None:
        """Be a receiving end of pdxfer in this process, with its settings as they are."""
        self._receiver = make_receiver("pdxfer", options)
        self.remote = {"remote": self._receiver.open(self._pool)}

    def do_watch(self, first: int, count: int) -> Message:
        """When each of `count` transfers was reported here (CLOCK_MONOTONIC, ns)."""
        if not isinstance(self._receiver, OwnReceiver):
            raise BenchError("only pdxfer's arrivals can be watched")
        return {"at_ns": self._receiver.watch(first, count)}

    def do_load_open(self, options: dict[str, Any], workload: dict[str, Any], remote: dict[str, Any]) -> Message:
        """Make a source pool here and connect to the receiving end of `remote`."""
        work = workload_from_json(workload)
        geometry = work.geometry()
        chosen = Options(**options, host=self._channel.local_host())
        self._back_pool = allocate(geometry.buffers, geometry.src_buffer, self._cuda)
        fill_source(self._back_pool, Content(work.seed, geometry.src_buffer, geometry.buffers))
        self._back = make_sender("pdxfer", chosen)
        self._back.connect(self._back_pool, remote)
        self._back.prepare(geometry, *make_pages(work))
        self._load = Repeated(self._back.transfer, at_once=DUPLEX_AT_ONCE)
        return {}

    def do_load_start(self) -> Message:
        assert self._load is not None
        self._load.start()
        return {}

    def do_load_stop(self) -> Message:
        assert self._load is not None
        seconds = self._load.stop()
        return {"per_second": self._load.count / seconds}

    def do_load_close(self) -> Message:
        if self._back is not None:
            self._back.close()
        self._back = self._load = self._back_pool = None
        return {}

    def do_copy_loop_make(self) -> Message:
        assert self._cuda is not None
        self._copies = CopyLoop(self._cuda)
        return {"handle": self._copies.handle}

    def do_copy_loop_open(self, handle: str) -> Message:
        assert self._copies is not None
        self._copies.open(handle)
        return {}

    def do_copy_loop_start(self) -> Message:
        assert self._copies is not None
        self._copies.loop.start()
        return {}

    def do_copy_loop_stop(self) -> Message:
        assert self._copies is not None
        seconds = self._copies.loop.stop()
        return {"per_second": self._copies.loop.count / seconds}

    def do_copy_loop_close(self) -> Message:
        if self._copies is not None:
            self._copies.close()
            self._copies = None
        return {}

    def do_compute_open(self, kind: str, device: int) -> Message:
        self._compute = Compute(kind, device)
        return {}

    def do_compute(self, seconds: float) -> Message:
        assert self._compute is not None
        return {"milliseconds": self._compute.milliseconds(seconds)}

    def do_compute_close(self) -> Message:
        self._compute = None
        return {}
