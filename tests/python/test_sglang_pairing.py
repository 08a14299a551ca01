"""Plans made from SGLang's buffer tables: whole pages, head slices in every direction, and tables that disagree.

The oracle is SGLang's documented arithmetic (one slice per token, K then V of each layer), written out plainly.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pdxfer
from pdxfer.sglang.pairing import Heads, Probe, head_slices, whole_pages

HEAD_BYTES, PAGES = 8, 12


class Side:
    """One rank's buffers, each in a region of its own, and a `find` over them."""

    def __init__(self, buffers: int, page_bytes: int, base: int, first_id: int) -> None:
        self.page_bytes = page_bytes
        self.pointers = [base + i * 1_000_000 for i in range(buffers)]
        self.lengths = [page_bytes] * buffers
        self.memory = {first_id + i: np.zeros(PAGES * page_bytes, dtype=np.uint8) for i in range(buffers)}
        self.regions = [
            SimpleNamespace(id=first_id + i, pointer=p, bytes=PAGES * page_bytes) for i, p in enumerate(self.pointers)
        ]

    def find(self, pointer: int, length: int) -> tuple[Any, int]:
        for region in self.regions:
            if region.pointer <= pointer and pointer + length <= region.pointer + region.bytes:
                return region, pointer - region.pointer
        raise pdxfer.InvalidError(f"no region at {pointer}")


def fill(side: Side, seed: int) -> None:
    source = np.random.default_rng(seed)
    for memory in side.memory.values():
        memory[:] = source.integers(0, 255, memory.size, dtype=np.uint8)


def execute(pairing: Any, src: Side, dst: Side, src_pages: Any, dst_pages: Any) -> None:
    from pdxfer import _core

    plan = pdxfer.make_plan(pairing, np.asarray(src_pages, np.int32), np.asarray(dst_pages, np.int32))
    _core.execute_local(plan, src.memory, dst.memory)


def test_whole_pages_move_between_paired_buffers_only() -> None:
    src, dst = Side(3, 64, 10_000_000, 1), Side(5, 64, 50_000_000, 101)
    fill(src, 1)
    order = [4, 0, 2]
    rows = np.array([[src.pointers[i], dst.pointers[j], 64] for i, j in enumerate(order)])
    execute(whole_pages(src.find, dst.find, rows), src, dst, [2, 3, 9], [1, 7, 0])
    for i, j in enumerate(order):
        have = dst.memory[101 + j].reshape(PAGES, 64)
        want = np.zeros_like(have)
        want[[1, 7, 0]] = src.memory[1 + i].reshape(PAGES, 64)[[2, 3, 9]]
        assert np.array_equal(have, want)
    assert not dst.memory[102].any() and not dst.memory[104].any()


def test_buffers_that_share_a_region_end_where_the_next_begins() -> None:
    src, dst = Side(2, 32, 10_000_000, 1), Side(1, 64, 50_000_000, 101)  # one region of 12 * 64: two buffers of 12 * 32
    rows = np.array([[src.pointers[i], dst.pointers[0] + i * PAGES * 32, 32] for i in range(2)])
    pairing = whole_pages(src.find, dst.find, rows)
    assert pairing.dst_pages == PAGES
    fill(src, 2)
    execute(pairing, src, dst, [0, 11], [11, 0])
    both = dst.memory[101].reshape(2, PAGES, 32)
    for i in range(2):
        assert np.array_equal(both[i][[11, 0]], src.memory[1 + i].reshape(PAGES, 32)[[0, 11]])


def sglang_rows(src: Side, dst: Side, heads: Heads) -> np.ndarray[Any, Any]:
    """What SGLang's sending method computes for page 0, one row per buffer and token."""
    src_heads, dst_heads = max(1, heads.total // heads.src_tp), max(1, heads.total // heads.dst_tp)
    if heads.src_tp > heads.dst_tp:
        copies = max(1, heads.src_tp // heads.total)
        count, src_start, dst_start = src_heads, 0, (heads.src_rank // copies * src_heads) % dst_heads
    else:
        copies = max(1, heads.dst_tp // heads.total)
        count, src_start, dst_start = dst_heads, (heads.dst_rank // copies * dst_heads) % src_heads, 0
    return np.array(
        [
            [
                s + t * src.page_bytes // heads.page_size + src_start * HEAD_BYTES,
                d + t * dst.page_bytes // heads.page_size + dst_start * HEAD_BYTES,
                count * HEAD_BYTES,
            ]
            for s, d in zip(src.pointers, dst.pointers, strict=True)
            for t in range(heads.page_size)
        ]
    )


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize(
    ("total", "src_tp", "dst_tp"), [(8, 1, 2), (8, 2, 1), (8, 4, 2), (8, 2, 8), (2, 4, 1), (2, 1, 4), (2, 8, 4)]
)
def test_heads_land_where_sglang_would_put_them(total: int, src_tp: int, dst_tp: int, page_size: int) -> None:
    ratio = max(1, src_tp // dst_tp)
    for dst_rank in range(dst_tp):
        dst = Side(4, page_size * max(1, total // dst_tp) * HEAD_BYTES, 50_000_000, 101)
        want = {k: v.copy() for k, v in dst.memory.items()}
        servers = [dst_rank * ratio + i for i in range(ratio)] if src_tp > dst_tp else [dst_rank // (dst_tp // src_tp)]
        for src_rank in servers:
            src = Side(4, page_size * max(1, total // src_tp) * HEAD_BYTES, 10_000_000, 1)
            fill(src, 100 + src_rank // max(1, src_tp // total))  # replicas hold equal heads
            heads = Heads(total, page_size, src_tp, src_rank, dst_tp, dst_rank)
            rows = sglang_rows(src, dst, heads)
            pairing = head_slices(
                src.find, dst.find, rows, (src.pointers, src.lengths), (dst.pointers, dst.lengths), heads
            )
            if not pairing.redundant:
                execute(pairing, src, dst, [5, 1], [0, 9])
            for s, d in ((5, 0), (1, 9)):
                for from_, to, length in rows.tolist():
                    i = (from_ - 10_000_000) // 1_000_000
                    a = from_ - src.pointers[i] + s * src.page_bytes
                    b = to - dst.pointers[i] + d * dst.page_bytes
                    want[101 + i][b : b + length] = src.memory[1 + i][a : a + length]
        for key, memory in dst.memory.items():
            assert np.array_equal(memory, want[key]), f"decode rank {dst_rank}, buffer {key}"


def test_replicated_heads_are_sent_by_one_rank_only() -> None:
    sent = []
    for src_rank in range(4):
        src, dst = Side(2, HEAD_BYTES, 10_000_000, 1), Side(2, 2 * HEAD_BYTES, 50_000_000, 101)
        heads = Heads(2, 1, 4, src_rank, 1, 0)
        rows = sglang_rows(src, dst, heads)
        sides = (src.pointers, src.lengths), (dst.pointers, dst.lengths)
        sent.append(not head_slices(src.find, dst.find, rows, *sides, heads).redundant)
    assert sent == [True, False, True, False]


def test_other_head_arithmetic_is_refused() -> None:
    src, dst = Side(2, 4 * HEAD_BYTES, 10_000_000, 1), Side(2, 2 * HEAD_BYTES, 50_000_000, 101)
    heads = Heads(4, 1, 1, 0, 2, 1)
    rows = sglang_rows(src, dst, heads)
    rows[:, 0] -= HEAD_BYTES  # SGLang would start one head earlier
    with pytest.raises(RuntimeError, match="head arithmetic differs"):
        head_slices(src.find, dst.find, rows, (src.pointers, src.lengths), (dst.pointers, dst.lengths), heads)
    with pytest.raises(RuntimeError, match="slices for a page"):
        head_slices(src.find, dst.find, rows[:0], (src.pointers, src.lengths), (dst.pointers, dst.lengths), heads)


def test_a_probe_is_its_session_id_and_collects_from_threads() -> None:
    probe = Probe("10.0.0.1:4711")
    assert probe == "10.0.0.1:4711" and {"10.0.0.1:4711": 1}[probe] == 1
    threads = [threading.Thread(target=probe.collect, args=([(i, i + 1, 2)] * 100,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = probe.rows()
    assert rows.shape == (800, 3) and rows[0].tolist() == [0, 1, 2] and rows[-1].tolist() == [7, 8, 2]
