"""cudaMemcpyBatchAsync into the receiver's memory, mapped over CUDA IPC: the driver's own way for many small pieces.

One call per request (cuMemcpyBatchAsync_v2, what the runtime's function calls), runs of pages merged, waited for.
There is no notice of arrival: completion of the stream is when the bytes are there.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from pdxfer.bench.cuda import Cuda, DeviceBuffer
from pdxfer.bench.errors import BenchError
from pdxfer.bench.memory import Pool, address_of
from pdxfer.bench.movers import Options, Path
from pdxfer.bench.workloads import Geometry, Pages, joint_runs


def make_sender(options: Options) -> BatchSender:
    return BatchSender(options)


def make_receiver(options: Options) -> BatchReceiver:
    return BatchReceiver()


class BatchSender:
    def __init__(self, options: Options) -> None:
        if options.memory != "device":
            raise BenchError("cudaMemcpyBatchAsync is a peer of device memory alone")
        self._cuda: Cuda | None = None
        self._local: list[int] = []
        self._remote: list[int] = []
        self._pieces: tuple[npt.NDArray[np.int64], ...] | None = None
        self._geometry: Geometry | None = None
        self._pages: tuple[Pages, Pages] | None = None

    def connect(self, pool: Pool, remote: dict[str, Any]) -> None:
        first = pool[0]
        assert isinstance(first, DeviceBuffer)
        self._cuda = first.cuda
        self._local = [address_of(buffer) for buffer in pool]
        self._remote = [first.cuda.open(handle) for handle in remote["handles"]]

    def path(self) -> Path:
        return Path("cuda_ipc", "cudaMemcpyBatchAsync")

    def prepare(self, geometry: Geometry, src: Pages, dst: Pages) -> None:
        self._geometry, self._pages = geometry, (src, dst)

    def transfer(self, number: int) -> float:
        assert self._cuda is not None
        begin = time.perf_counter()
        src, dst, size = self._offsets()
        sources = (np.array(self._local, dtype=np.int64)[:, None] + src).ravel().astype(np.uint64)
        targets = (np.array(self._remote, dtype=np.int64)[:, None] + dst).ravel().astype(np.uint64)
        sizes = np.tile(size, len(self._local)).astype(np.uint64)
        planned = time.perf_counter() - begin
        self._cuda.copy_batch(targets, sources, sizes)
        return planned

    def _offsets(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of every piece in a buffer: where it begins at the source and at the target, and its bytes."""
        assert self._geometry is not None and self._pages is not None
        geometry = self._geometry
        if geometry.whole:
            runs, page = joint_runs(*self._pages), geometry.page_size * geometry.piece
            return runs.src * page, runs.dst * page, runs.pages * page
        tokens = np.arange(geometry.page_size, dtype=np.int64)
        src, dst = (
            (pages.astype(np.int64)[:, None] * geometry.page_size + tokens).ravel() * token + skip
            for pages, token, skip in (
                (self._pages[0], geometry.src_token, geometry.src_skip),
                (self._pages[1], geometry.dst_token, geometry.dst_skip),
            )
        )
        return src, dst, np.full(len(src), geometry.piece)

    def note(self) -> str:
        return ""

    def versions(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        for pointer in self._remote:
            assert self._cuda is not None
            self._cuda.close_shared(pointer)
        self._remote = []


class BatchReceiver:
    def open(self, pool: Pool) -> dict[str, Any]:
        handles = []
        for buffer in pool:
            assert isinstance(buffer, DeviceBuffer)
            handles.append(buffer.cuda.share(buffer.pointer))
        return {"handles": handles}

    def arrived(self, number: int) -> None:
        """The stream completed at the sender; the driver has no notice of arrival."""

    def close(self) -> None:
        """The memory is the pool's."""
