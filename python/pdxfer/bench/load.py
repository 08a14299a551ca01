"""Transfers, copies or arithmetic that go on until they are stopped, and how many of them there were.

The studies of bench/studies.py run one of these at each end at once. `Repeated` runs its step in threads of its own;
the step releases the GIL while it waits. `Compute` is the work of a model that shares the GPU; it needs torch.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from pdxfer.bench.errors import BenchError

STOP_SECONDS = 60.0
GEMM = 8192  # rows and columns, bf16
MEMORY_BYTES = 1 << 30
COMPUTE = ("gemm", "gemm of zeros", "memory")
_BATCH = 8  # iterations between two events


class Repeated:
    """Calls `step(number)` back to back from `start` to `stop`; `attach` is called in each thread first.

    Args:
        at_once: steps under way at a time, each in a thread.
    """

    def __init__(
        self, step: Callable[[int], object], attach: Callable[[], None] | None = None, at_once: int = 1
    ) -> None:
        self._step, self._attach, self._at_once = step, attach, at_once
        self._stop = threading.Event()
        self._lock = threading.Lock()  # of what the threads tell: the error, the end, the count
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._began = self._ended = 0.0
        self.count = 0

    def start(self, first: int = 0) -> None:
        self._stop.clear()
        self.count, self._error = 0, None
        numbers = itertools.count(first)
        self._threads = [
            threading.Thread(target=self._run, args=(numbers,), name="bench-load", daemon=True)
            for _ in range(self._at_once)
        ]
        self._began = self._ended = time.perf_counter()
        for thread in self._threads:
            thread.start()

    def _run(self, numbers: Iterator[int]) -> None:
        try:
            if self._attach is not None:
                self._attach()
            while not self._stop.is_set():
                self._step(next(numbers))
                with self._lock:
                    self.count += 1
                    self._ended = time.perf_counter()
        except BaseException as error:  # raised again by stop()
            with self._lock:
                self._error = self._error or error
            self._stop.set()

    def stop(self) -> float:
        """Seconds that `count` steps took.

        Raises:
            BenchError: a step failed, or does not end.
        """
        assert self._threads
        self._stop.set()
        deadline = time.monotonic() + STOP_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            raise BenchError(f"a transfer did not end within {STOP_SECONDS:g} s")
        if self._error is not None:
            raise BenchError(f"back to back, number {self.count}: {self._error}") from self._error
        return self._ended - self._began

    def during(self, seconds: float, first: int = 0) -> float:
        """Steps per second over that time."""
        self.start(first)
        time.sleep(seconds)
        elapsed = self.stop()
        return self.count / elapsed


class Compute:
    """A loop on a GPU: "gemm" (bf16 8192 x 8192 x 8192), "gemm of zeros", or "memory" (a copy of 1 GiB inside the GPU).

    A GEMM of random numbers takes a GPU to its power limit, where whatever else it does lowers its clock; one of zeros
    stays far from it, and notices only multiprocessors and bandwidth that it does not get.

    Raises:
        ImportError: there is no torch.
    """

    def __init__(self, kind: str, device: int) -> None:
        import torch

        self._torch: Any = torch
        torch.cuda.set_device(device)
        where = {"device": f"cuda:{device}"}
        if kind in ("gemm", "gemm of zeros"):
            make = torch.randn if kind == "gemm" else torch.zeros
            a, b = (make(GEMM, GEMM, dtype=torch.bfloat16, **where) for _ in range(2))
            out = torch.empty_like(a)
            self._step: Callable[[], object] = lambda: torch.matmul(a, b, out=out)
        elif kind == "memory":
            source = torch.randint(0, 256, (MEMORY_BYTES,), dtype=torch.uint8, **where)
            target = torch.empty_like(source)
            self._step = lambda: target.copy_(source)
        else:
            raise BenchError(f"a loop of kind {kind!r}: expected one of {', '.join(COMPUTE)}")

    def milliseconds(self, seconds: float) -> float:
        """Median milliseconds of a step over that time, by the GPU's own clock; the queue never runs dry."""
        torch, took = self._torch, []
        deadline = time.monotonic() + seconds
        events = [torch.cuda.Event(enable_timing=True)]
        for _ in range(3):
            self._step()
        events[0].record()
        while time.monotonic() < deadline:
            for _ in range(_BATCH):
                self._step()
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
            if len(events) > 2:
                events[-2].synchronize()
        torch.cuda.synchronize()
        took = [a.elapsed_time(b) / _BATCH for a, b in zip(events, events[1:], strict=False)]
        return float(np.median(took))
