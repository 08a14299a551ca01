"""Engines in processes of their own, for tests that kill them; the test keeps their memory and looks at it.

`Child` starts a process with one engine (forked from a server that has imported everything: quick), whose pool is a
file of /dev/shm that the test maps too, so that it can be checked after a kill. `Child.call` has a bound.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from bed import NEAR

import pdxfer

TRANSPORT = os.environ.get("RDMA_BED_TRANSPORT", "rdma")  # another one shows that a test's own part is right
GUARD = 0xAA
Pages = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["ends"])


def map_pool(path: str, size: int) -> Bytes:
    with open(path, "r+b") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), size), dtype=np.uint8)


class Server:
    """The child's side: one method per command."""

    def __init__(self, host: str, path: str, size: int, settings: dict[str, Any]) -> None:
        config = pdxfer.Config(
            environment=False, log_level="error", **{"host": host, "transports": TRANSPORT, **settings}
        )
        self._engine = pdxfer.Engine(config)
        self._pool = map_pool(path, size)
        self._region = self._engine.register_memory(self._pool)
        self._peer: Any = None
        self._there: Any = None
        self._more: list[Any] = []

    def about(self) -> dict[str, Any]:
        return {"address": self._engine.address, "pointer": self._region.pointer, "bytes": self._region.bytes}

    def connect(self, there: dict[str, Any]) -> str:
        self._peer = self._engine.connect(there["address"], timeout=10)
        self._there = self._peer.find_region(there["pointer"], there["bytes"], timeout=10)[0]
        return self.path()

    def path(self) -> str:
        told = self._engine.explain(self._peer)
        return f"{told['transport']}: {told['path']}"

    def disconnect(self) -> None:
        self._engine.disconnect(self._peer)

    def _plan(self, page_bytes: int, src: Pages, dst: Pages) -> Any:
        slots = self._region.bytes // page_bytes
        mine = pdxfer.KvLayout([(self._region, 0)], page_bytes=page_bytes, slots=slots)
        theirs = pdxfer.KvLayout([(self._there, 0)], page_bytes=page_bytes, slots=self._there.bytes // page_bytes)
        return pdxfer.make_plan(mine, theirs, src, dst)

    def move(
        self, jobs: list[tuple[int, Pages, Pages]], patience: float, cancel: bool = False
    ) -> list[tuple[str, float]]:
        """Submit every job (page bytes, source pages, target pages), wait for all: outcome and time of each."""
        batches = []
        outcomes: dict[int, tuple[str, float]] = {}
        for number, (page_bytes, src, dst) in enumerate(jobs):
            try:
                batches.append((number, self._engine.submit(self._peer, self._plan(page_bytes, src, dst), tag=number)))
            except pdxfer.PdxferError as error:
                outcomes[number] = (type(error).__name__, time.monotonic())
        if cancel:
            for _, batch in batches:
                self._engine.cancel(batch)
        deadline = time.monotonic() + patience
        for number, batch in batches:
            try:
                batch.wait(max(0.01, deadline - time.monotonic()))
                outcomes[number] = ("ok", time.monotonic())
            except pdxfer.PdxferError as error:
                outcomes[number] = (type(error).__name__, time.monotonic())
        return [outcomes[number] for number in range(len(jobs))]

    def stream(self, jobs: list[tuple[int, Pages, Pages]], patience: float, seconds: float) -> list[tuple[str, float]]:
        """`move` the same bytes over and over, for `seconds` or until a batch fails: something is always in flight."""
        end = time.monotonic() + seconds
        while True:
            outcomes = self.move(jobs, patience)
            if time.monotonic() > end or any(outcome != "ok" for outcome, _ in outcomes):
                return outcomes

    def wait_lost(self, patience: float) -> float | None:
        """When no peer was alive any more; None: there still is one after `patience` seconds."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if not any(peer.alive for peer in self._engine.peers()):
                return time.monotonic()
            time.sleep(0.002)
        return None

    def arrivals(self) -> list[tuple[int, bool]]:
        return [(arrival.tag, arrival.ok) for arrival in self._engine.poll(4096)]

    def register_cycle(self, times: int) -> None:
        memory = np.zeros(1 << 20, np.uint8)
        for _ in range(times):
            self._engine.deregister_memory(self._engine.register_memory(memory))

    def footprint(self) -> dict[str, int]:
        """Resident KiB, descriptors and threads of this process."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return {
            "resident_kib": int(status["RssAnon"].split()[0]),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": int(status["Threads"]),
        }

    def close(self) -> None:
        self._engine.close()


def _serve(link: Connection, make: Callable[..., Server], arguments: tuple[Any, ...]) -> None:
    try:
        server = make(*arguments)
    except pdxfer.PdxferError as error:
        link.send(("error", f"{type(error).__name__}: {error}"))
        return
    link.send(("ok", server.about()))
    while True:
        try:
            name, given = link.recv()
        except EOFError:
            os._exit(0)
        try:
            link.send(("ok", getattr(server, name)(*given)))
        except Exception as error:
            link.send(("error", f"{type(error).__name__}: {error}"))
        if name == "close":
            os._exit(0)


class Child:
    """One engine in its own process, and its pool as the test sees it."""

    def __init__(self, host: str, size: int, **settings: Any) -> None:
        self.path = f"/dev/shm/pool-{os.getpid()}-{time.monotonic_ns()}"
        with open(self.path, "wb") as file:
            file.truncate(size)
        self.pool = map_pool(self.path, size)
        if TRANSPORT == "rdma":  # one device per end: with two, pairs of one device would stay off the link
            settings = {"rdma": f"devices={'rxe0' if host == NEAR else 'rxe1'}", **settings}
        self._link, theirs = _processes.Pipe()
        self._process = _processes.Process(target=_serve, args=(theirs, Server, (host, self.path, size, settings)))
        self._process.start()
        theirs.close()
        self.about: dict[str, Any] = self._answer(30)

    def start(self, name: str, *given: Any) -> None:
        self._link.send((name, given))

    def _answer(self, patience: float) -> Any:
        if not self._link.poll(patience):
            raise AssertionError(f"hang: process {self._process.pid} did not answer within {patience:g} s")
        state, value = self._link.recv()
        if state == "error":
            raise RuntimeError(value)
        return value

    def finish(self, patience: float = 30) -> Any:
        return self._answer(patience)

    def call(self, name: str, *given: Any, patience: float = 30) -> Any:
        self.start(name, *given)
        return self._answer(patience)

    def kill(self) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join(10)
        self._link.close()
        Path(self.path).unlink(missing_ok=True)
