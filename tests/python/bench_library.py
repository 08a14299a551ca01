"""A transfer library in one process whose faults are known, and a receiving end in a thread, for tests of the bench."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from pdxfer.bench import movers, session
from pdxfer.bench.channel import Channel
from pdxfer.bench.errors import BenchError, EndGone
from pdxfer.bench.memory import ByteArray
from pdxfer.bench.movers import Options
from pdxfer.bench.runner import Row, Runner, Settings
from pdxfer.bench.workloads import Geometry, Pages, Workload

QUICK = Settings(repeats=3, warmups=1, least=1)


class Library(ModuleType):
    """A transfer library in one process: the receiver's pool is written directly. `fault` says how it errs."""

    def __init__(self) -> None:
        super().__init__("bench_test_library")
        self.fault = ""
        self.target: list[ByteArray] = []
        self.opened = self.closed = self.transfers = 0

    def make_receiver(self, options: Options) -> Library:
        self.opened += 1
        return self

    def make_sender(self, options: Options) -> Library:
        self.opened += 1
        if self.fault == "missing":
            raise ImportError("no such library")
        return self

    def open(self, pool: list[ByteArray]) -> dict[str, Any]:
        self.target = pool
        return {"fine": True}

    def arrived(self, number: int) -> None:
        if self.fault == "no notice":
            raise BenchError("no notice of arrival")

    def connect(self, pool: list[ByteArray], remote: dict[str, Any]) -> None:
        assert remote == {"fine": True}
        self.source = pool
        if self.fault == "refused":
            raise ConnectionError("nobody there")

    def path(self) -> movers.Path:
        return movers.Path("shm", "by hand")

    def prepare(self, geometry: Geometry, src: Pages, dst: Pages) -> None:
        self.geometry, self.src, self.dst = geometry, src, dst

    def transfer(self, number: int) -> float:
        if self.fault == "raises":
            raise TimeoutError("took too long")
        g = self.geometry
        self.transfers = number + 1
        if (self.fault == "lazy" and number == 2) or (self.fault == "lazy burst" and number > 1):
            return 0.0
        if self.fault == "raises in a burst" and number == 3:
            raise TimeoutError("took too long")
        for source, target in zip(self.source, self.target, strict=True):
            frm = source.reshape(g.src_slots, g.page_size, g.src_token)[:, :, g.src_skip : g.src_skip + g.piece]
            to = target.reshape(g.dst_slots, g.page_size, g.dst_token)[:, :, g.dst_skip : g.dst_skip + g.piece]
            to[self.dst] = frm[self.src]
        if self.fault == "flips":
            self.target[20][int(self.dst[3]) * g.page_size * g.dst_token + 5] ^= 4
        if self.fault == "spills":
            free = next(p for p in range(g.dst_slots) if p not in set(self.dst.tolist()))
            self.target[55][free * g.page_size * g.dst_token] = 0
        return 1e-6

    def note(self) -> str:
        return ""

    def versions(self) -> dict[str, str]:
        return {"library": "1"}

    def close(self) -> None:
        self.closed += 1


@contextlib.contextmanager
def served_channel() -> Iterator[Channel]:
    """A channel to a receiving end in a thread of this process."""
    ours, theirs = socket.socketpair()
    served = session.Session(Channel(theirs, "the sending end"))

    def serve() -> None:
        with contextlib.suppress(EndGone):
            served.serve()
        served.close()

    thread = threading.Thread(target=serve)
    thread.start()
    out = Channel(ours, "the receiving end")
    yield out
    out.close()
    thread.join(10)
    theirs.close()
    assert not thread.is_alive()


def run(channel: Channel, works: list[Workload], settings: Settings = QUICK) -> list[Row]:
    """The rows of the library of conftest.py's fixture `library`."""
    return list(Runner(channel, settings, lambda work, fraction: None).run("test", Options("shm"), works))
