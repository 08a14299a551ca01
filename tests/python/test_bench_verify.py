"""The bench's verification: a right destination passes, and every way to be wrong is found."""

from __future__ import annotations

import numpy as np
import pytest

from pdxfer.bench.memory import GUARD, ByteArray, Content, allocate, fill_guard, fill_source
from pdxfer.bench.verify import Sample, verify
from pdxfer.bench.workloads import RAW, Geometry, Pages, Workload, make_pages

CASES = [
    Workload("Qwen2.5-7B", 1, 64, "random", 256),
    Workload("DeepSeek-V3", 16, 64, "busy-decode", 256),
    Workload("Qwen2.5-7B", 16, 64, "random", 256, src_tp=2, dst_tp=1),
    Workload("Qwen2.5-7B", 16, 64, "contiguous", 256, src_tp=1, dst_tp=4),
    Workload(RAW, 1, 100, "random", 400, raw_bytes=7),
]


class Moved:
    """Both pools of a workload after a transfer that went byte by byte as its page lists say."""

    def __init__(self, work: Workload) -> None:
        self.geometry: Geometry = work.geometry()
        self.src, self.dst = make_pages(work)
        g = self.geometry
        self.content = Content(work.seed, g.src_buffer, g.buffers)
        self.source, self.target = allocate(g.buffers, g.src_buffer), allocate(g.buffers, g.dst_buffer)
        fill_source(self.source, self.content)
        fill_guard(self.target)
        self.move(self.src, self.dst)

    def move(self, src: Pages, dst: Pages) -> None:
        g = self.geometry
        for source, target in zip(self.source, self.target, strict=True):
            for s, d in zip(src.tolist(), dst.tolist(), strict=True):
                for token in range(g.page_size):
                    frm = (s * g.page_size + token) * g.src_token + g.src_skip
                    to = (d * g.page_size + token) * g.dst_token + g.dst_skip
                    target[to : to + g.piece] = source[frm : frm + g.piece]

    def place(self, entry: int) -> int:
        """The first target byte of a page list's entry, within its buffer."""
        g = self.geometry
        return int(self.dst[entry]) * g.page_size * g.dst_token + g.dst_skip

    def outside(self) -> int:
        """A byte of a page that is not a target."""
        page = next(p for p in range(self.geometry.dst_slots) if p not in set(self.dst.tolist()))
        return page * self.geometry.page_size * self.geometry.dst_token

    def wrong(self) -> str | None:
        return verify(self.target, self.geometry, self.src, self.dst, self.content)


def is_guard(pool: list[ByteArray]) -> bool:
    return all((buffer == GUARD).all() for buffer in pool)


@pytest.mark.parametrize("work", CASES, ids=lambda work: work.label)
def test_a_right_destination_passes_and_is_guard_afterwards(work: Workload) -> None:
    moved = Moved(work)
    assert moved.wrong() is None
    assert is_guard(moved.target)


@pytest.mark.parametrize("work", CASES, ids=lambda work: work.label)
def test_one_flipped_byte_is_found(work: Workload) -> None:
    moved = Moved(work)
    buffer, entry = moved.geometry.buffers - 1, moved.geometry.pages - 1
    moved.target[buffer][moved.place(entry)] ^= 1
    wrong = moved.wrong()
    assert wrong is not None and f"buffer {buffer}, entry {entry}" in wrong and "expected 0x" in wrong
    assert is_guard(moved.target)


@pytest.mark.parametrize("work", CASES, ids=lambda work: work.label)
def test_one_touched_guard_byte_is_found(work: Workload) -> None:
    moved = Moved(work)
    moved.target[0][moved.outside()] ^= 1
    wrong = moved.wrong()
    assert wrong is not None and "outside the target pages" in wrong
    assert f"byte {moved.outside()}" in wrong
    assert is_guard(moved.target)


def test_heads_of_other_ranks_are_guarded_too() -> None:
    moved = Moved(CASES[2])
    assert moved.geometry.dst_skip == 512
    moved.target[3][moved.place(0) - 1] ^= 0x80  # the last byte of the other rank's heads, in a target page
    wrong = moved.wrong()
    assert wrong is not None and "outside the target pages" in wrong


def test_swapped_and_missing_pages_are_found() -> None:
    moved = Moved(CASES[0])
    swapped = moved.dst.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    moved.move(moved.src, swapped)
    assert moved.wrong() is not None

    moved = Moved(CASES[0])
    place = moved.place(5)
    moved.target[7][place : place + 1024] = GUARD
    wrong = moved.wrong()
    assert wrong is not None and "entry 5" in wrong


def test_swapped_buffers_are_found() -> None:
    moved = Moved(CASES[1])
    moved.target[0], moved.target[1] = moved.target[1], moved.target[0]
    assert moved.wrong() is not None


def test_content_differs_between_buffers_seeds_and_places() -> None:
    content, other = Content(1, 1 << 16, 4), Content(2, 1 << 16, 4)
    pages = np.concatenate([content.of(buffer).reshape(-1, 64) for buffer in range(4)])
    assert len(np.unique(pages, axis=0)) == len(pages)
    assert not np.array_equal(content.of(0), other.of(0))
    assert np.array_equal(content.of(3), Content(1, 1 << 16, 4).of(3))
    with pytest.raises(ValueError, match="read-only"):
        content.of(0)[0] = 1


@pytest.mark.parametrize("work", CASES, ids=lambda work: work.label)
def test_sample_sees_a_repeat_that_moved_nothing(work: Workload) -> None:
    moved = Moved(work)
    sample = Sample(moved.target, moved.geometry, (moved.src, moved.dst), moved.content)
    assert sample.check() is None
    sample.spoil()
    wrong = sample.check()
    assert wrong is not None and "had not arrived" in wrong
    moved.move(moved.src, moved.dst)
    assert sample.check() is None
    assert moved.wrong() is None  # it spoils target bytes only
