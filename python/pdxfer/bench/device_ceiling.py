"""What the GPUs can do, measured between the same two processes, beside every repeat.

mapped rows: one copy of 1 GiB by the copy engine from this GPU into a buffer of the other process, opened over CUDA
IPC (what cudaMemcpyPeer does between two GPUs). Staged rows: the slower of pinned copies of 256 MiB, from this GPU to
host memory here and from host memory to the GPU at the other end.
"""

from __future__ import annotations

import numpy as np

from pdxfer.bench.channel import Channel
from pdxfer.bench.cuda import Cuda, DeviceBuffer
from pdxfer.bench.memory import ByteArray

PEER_BYTES = 1 << 30
PINNED_BYTES = 256 << 20


class PeerCopyCeiling:
    """Sending end. `measure` gives the seconds that `bytes` bytes would take at the rate of the 1 GiB copy."""

    kind = "cudaMemcpyPeer of 1 GiB"

    def __init__(self, cuda: Cuda, channel: Channel, bytes: int) -> None:
        self._cuda, self._bytes = cuda, bytes
        self._source = cuda.allocate(PEER_BYTES)
        cuda.fill(self._source.pointer, 0x5C, PEER_BYTES)
        self._target = cuda.open(channel.call("peer_target", bytes=PEER_BYTES)["handle"])
        for _ in range(2):
            self.measure()

    def measure(self) -> float:
        seconds = self._cuda.copy_seconds(self._target, self._source.pointer, PEER_BYTES)
        return seconds * self._bytes / PEER_BYTES

    def close(self) -> None:
        self._cuda.close_shared(self._target)
        del self._source


class PinnedCopyCeiling:
    """Sending end: the slower of device to host here and host to device there."""

    kind = "pinned copies of 256 MiB, the slower of device to host and host to device"

    def __init__(self, cuda: Cuda, channel: Channel, bytes: int) -> None:
        self._here, self._channel, self._bytes = PinnedCopies(cuda), channel, bytes

    def measure(self) -> float:
        there = float(self._channel.call("pinned_seconds")["to_device"])
        return max(self._here.to_host(), there) * self._bytes / PINNED_BYTES

    def close(self) -> None:
        self._here.close()


class PinnedCopies:
    """256 MiB of pinned host memory and as much of a GPU. The pinned part is kept for the process's life."""

    _pinned: dict[int, ByteArray] = {}

    def __init__(self, cuda: Cuda) -> None:
        if cuda.ordinal not in self._pinned:
            self._pinned[cuda.ordinal] = cuda.pinned(PINNED_BYTES)
            self._pinned[cuda.ordinal].fill(1)
        self._cuda = cuda
        self._host = self._pinned[cuda.ordinal]
        self._buffer: DeviceBuffer | None = cuda.allocate(PINNED_BYTES)
        self.to_device()

    def to_host(self) -> float:
        assert self._buffer is not None
        return self._cuda.copy_seconds(self._host.ctypes.data, self._buffer.pointer, PINNED_BYTES)

    def to_device(self) -> float:
        assert self._buffer is not None
        return self._cuda.copy_seconds(self._buffer.pointer, self._host.ctypes.data, PINNED_BYTES)

    def close(self) -> None:
        self._buffer = None


def host_source(bytes: int) -> list[ByteArray]:
    """Host memory for the raw streams of a tcp row whose pages are on a GPU."""
    return [np.ones(bytes, dtype=np.uint8)]
