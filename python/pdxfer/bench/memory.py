"""The pools of both ends, in host or GPU memory: allocation, source content and guard content.

Every buffer is its own allocation, as a serving engine allocates one tensor per layer. Source content is one block of
seeded random bytes, rotated by a different amount in every buffer: both ends can make it without talking, and a page
that lands in the wrong slot, layer or group is seen.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pdxfer.bench.cuda import Cuda, DeviceBuffer
from pdxfer.bench.errors import BenchError

ByteArray = npt.NDArray[np.uint8]
Buffer: TypeAlias = "ByteArray | DeviceBuffer"
Pool: TypeAlias = "Sequence[Buffer]"

GUARD = 0xA5
ROTATION = 4099  # bytes between the starts of two buffers' content: prime, so no page size divides it
_MALLOC_OFFSET = 64
_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that can be allocated without swapping: MemAvailable, or what is left of this cgroup's limit."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError):  # no cgroup v2, or the root group, which has no limit
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
            used -= int(stat.get("inactive_file", "0"))
            available = min(available, max(0, int(limit) - used))
    return available


class Content:
    """What source buffers hold: `of(buffer)` is a read-only view of its bytes.

    Args:
        seed: both ends give the same.
        buffer_bytes: bytes of one source buffer.
        buffers: how many there are.
    """

    def __init__(self, seed: int, buffer_bytes: int, buffers: int) -> None:
        words = (buffer_bytes + buffers * ROTATION) // 8 + 1
        self._block: ByteArray = np.random.PCG64(seed).random_raw(words).view(np.uint8)
        self._block.flags.writeable = False
        self._bytes = buffer_bytes

    def of(self, buffer: int) -> ByteArray:
        return self._block[buffer * ROTATION : buffer * ROTATION + self._bytes]


def allocate(buffers: int, buffer_bytes: int, cuda: Cuda | None = None) -> Pool:
    """That many buffers of that many bytes, unwritten: on the GPU `cuda`, or in host memory.

    Raises:
        BenchError: the machine does not have them; nothing stays allocated.
    """
    if cuda is not None:
        return [cuda.allocate(buffer_bytes) for _ in range(buffers)]
    need, have = buffers * buffer_bytes, available_memory()
    if need > have:
        raise BenchError(f"a pool of {need >> 20} MiB does not fit the {have >> 20} MiB available; lower --tokens")
    return [_buffer(buffer_bytes) for _ in range(buffers)]


def host_buffers(pool: Pool) -> list[ByteArray]:
    """The pool's buffers that are host memory."""
    return [buffer for buffer in pool if not isinstance(buffer, DeviceBuffer)]


def address_of(buffer: Buffer) -> int:
    """The address that libraries are given."""
    return buffer.pointer if isinstance(buffer, DeviceBuffer) else int(buffer.ctypes.data)


def _buffer(count: int) -> ByteArray:
    """Memory as malloc gives a serving engine's tensor of many MiB: private pages of its own, 64 bytes into the first.

    Asked for outright: malloc itself would put a smaller buffer on the heap once one of its size was freed.
    """
    pages = mmap.mmap(-1, count + _MALLOC_OFFSET, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype=np.uint8, count=count, offset=_MALLOC_OFFSET)


def fill_source(pool: Pool, content: Content) -> None:
    for index, buffer in enumerate(pool):
        if isinstance(buffer, DeviceBuffer):
            buffer.cuda.upload(buffer.pointer, content.of(index))
        else:
            np.copyto(buffer, content.of(index))


def fill_guard(pool: Sequence[Buffer]) -> None:
    for buffer in pool:
        if isinstance(buffer, DeviceBuffer):
            buffer.cuda.fill(buffer.pointer, GUARD, buffer.nbytes)
        else:
            buffer.fill(GUARD)


def machine() -> dict[str, object]:
    """What the figures were measured on; no host name."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": os.uname().release,
        "arch": os.uname().machine,
    }
