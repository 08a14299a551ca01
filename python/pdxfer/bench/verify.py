"""Does the destination hold exactly what it should? Computed from the page lists alone, not from the plan.

`verify` looks at every byte of the destination pool: the target pieces equal the source's content, and everything
else is still guard. `Sample` spoils a few thousand target bytes before each repeat and looks at them right after the
sender was told that the transfer completed, so a repeat that moved nothing, or completed too early, is seen too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pdxfer.bench.cuda import DeviceBuffer
from pdxfer.bench.memory import GUARD, Buffer, ByteArray, Content, Pool, fill_guard
from pdxfer.bench.workloads import Geometry, Pages

_STEP = 1 << 20  # bytes looked at in one go: fits the cache


def _source_pieces(content: Content, buffer: int, geometry: Geometry) -> ByteArray:
    """A source buffer's content as (page, token, byte of the piece)."""
    tokens = content.of(buffer).reshape(geometry.src_slots, geometry.page_size, geometry.src_token)
    return tokens[:, :, geometry.src_skip : geometry.src_skip + geometry.piece]


def _target_pieces(memory: ByteArray, geometry: Geometry) -> ByteArray:
    tokens = memory.reshape(geometry.dst_slots, geometry.page_size, geometry.dst_token)
    return tokens[:, :, geometry.dst_skip : geometry.dst_skip + geometry.piece]


def verify(pool: Pool, geometry: Geometry, src: Pages, dst: Pages, content: Content) -> str | None:
    """None when the pool is exactly right, else what is wrong and where. Leaves the whole pool guard again.

    GPU memory is copied back, a buffer at a time.

    Args:
        pool: destination buffers, `geometry.dst_buffer` bytes each.
        src, dst: page lists, int32.
        content: what the source buffers hold.
    """
    wrong: str | None = None
    copy: ByteArray | None = None
    for index, buffer in enumerate(pool):
        if isinstance(buffer, DeviceBuffer):
            copy = np.empty(buffer.nbytes, dtype=np.uint8) if copy is None else copy
            buffer.cuda.download(copy, buffer.pointer)
            memory = copy
        else:
            memory = buffer
        here = _verify_buffer(memory, index, geometry, src, dst, content)
        wrong = wrong or here
        if isinstance(buffer, DeviceBuffer):
            fill_guard([buffer])
    return wrong


def _verify_buffer(
    memory: ByteArray, buffer: int, geometry: Geometry, src: Pages, dst: Pages, content: Content
) -> str | None:
    """Of one destination buffer in host memory, which is all guard afterwards."""
    wrong = _pieces_differ(memory, buffer, geometry, src, dst, content)
    targets = _target_pieces(memory, geometry)
    targets[dst] = GUARD
    outside = _first_not_guard(memory)
    if outside is not None:
        page_bytes = geometry.page_size * geometry.dst_token
        where = f"buffer {buffer}, byte {outside} (page {outside // page_bytes}, byte {outside % page_bytes} of it)"
        wrong = wrong or f"a byte outside the target pages changed: {where}"
        memory.fill(GUARD)
    return wrong


def _pieces_differ(
    memory: ByteArray, buffer: int, geometry: Geometry, src: Pages, dst: Pages, content: Content
) -> str | None:
    targets, sources = _target_pieces(memory, geometry), _source_pieces(content, buffer, geometry)
    step = max(1, _STEP // (geometry.page_size * geometry.piece))
    for first in range(0, len(dst), step):
        got, want = targets[dst[first : first + step]], sources[src[first : first + step]]
        if np.array_equal(got, want):
            continue
        entry, token, byte = (int(i) for i in np.argwhere(got != want)[0])
        page = first + entry
        return (
            f"buffer {buffer}, entry {page} (source page {src[page]} to page {dst[page]}), token {token}, byte {byte}: "
            f"got {got[entry, token, byte]:#04x}, expected {want[entry, token, byte]:#04x}"
        )
    return None


def _first_not_guard(memory: ByteArray) -> int | None:
    for first in range(0, len(memory), _STEP):
        same = memory[first : first + _STEP] == GUARD
        if not same.all():
            return first + int(np.argmin(same))
    return None


class Sample:
    """A fixed random choice of target bytes, in every buffer.

    Args:
        count: bytes to choose, over all buffers; at least one per buffer is taken. On a GPU each costs a copy, so a
            quarter of them are taken there.
    """

    def __init__(
        self,
        pool: Pool,
        geometry: Geometry,
        pages: tuple[Pages, Pages],
        content: Content,
        count: int = 4096,
    ) -> None:
        src, dst = pages
        rng = np.random.default_rng(geometry.pages)
        each = max(1, (count // 4 if isinstance(pool[0], DeviceBuffer) else count) // len(pool))
        self._pool = pool
        self._places: list[npt.NDArray[np.int64]] = []
        self._expected: list[ByteArray] = []
        for buffer in range(len(pool)):
            entry = rng.integers(0, len(dst), each)
            token = rng.integers(0, geometry.page_size, each)
            byte = rng.integers(0, geometry.piece, each)
            place = (dst[entry].astype(np.int64) * geometry.page_size + token) * geometry.dst_token
            self._places.append(place + geometry.dst_skip + byte)
            self._expected.append(_source_pieces(content, buffer, geometry)[src[entry], token, byte])

    def spoil(self) -> None:
        """Make every chosen byte wrong."""
        for memory, places, expected in zip(self._pool, self._places, self._expected, strict=True):
            if isinstance(memory, DeviceBuffer):
                for place, byte in zip(places, ~expected, strict=True):
                    memory.cuda.fill(memory.pointer + int(place), int(byte), 1)
            else:
                memory[places] = ~expected

    def check(self) -> str | None:
        """None when every chosen byte has arrived."""
        missing = 0
        for memory, places, expected in zip(self._pool, self._places, self._expected, strict=True):
            missing += int(np.count_nonzero(_bytes_at(memory, places) != expected))
        if not missing:
            return None
        total = sum(len(places) for places in self._places)
        return f"{missing} of {total} sampled bytes had not arrived when the transfer was reported complete"


def _bytes_at(memory: Buffer, places: npt.NDArray[np.int64]) -> ByteArray:
    if not isinstance(memory, DeviceBuffer):
        return memory[places]
    got = np.empty(len(places), dtype=np.uint8)
    for index, place in enumerate(places):
        memory.cuda.download(got[index : index + 1], memory.pointer + int(place))
    return got
