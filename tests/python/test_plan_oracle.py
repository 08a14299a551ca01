"""Property tests: native plans, carried out in this process, against the NumPy oracle in tests/reference.py.

Every byte of every destination region is compared, gaps between buffers included.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pdxfer import _core
from pdxfer.layout import KvLayout, make_plan, pair_layouts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import reference

SIZES = [1, 2, 4, 8]


@dataclass
class Side:
    layout: KvLayout
    memory: dict[int, np.ndarray]


def place(rng, page_bytes, slots, **fields) -> Side:
    """Buffers in random regions with random gaps between, filled with random bytes."""
    regions = rng.integers(1, 4)
    used = {int(r) + 1: int(rng.integers(0, 70)) for r in range(regions)}
    buffers = []
    for size in page_bytes:
        region = int(rng.integers(1, regions + 1))
        buffers.append((region, used[region]))
        used[region] += size * slots + int(rng.integers(0, 70))
    memory = {region: rng.integers(0, 256, size + 1, dtype=np.uint8) for region, size in used.items()}
    one = len(set(page_bytes)) == 1 and rng.integers(0, 2)
    layout = KvLayout(buffers=buffers, page_bytes=page_bytes[0] if one else page_bytes, slots=slots, **fields)
    return Side(layout, memory)


def random_pages(rng, count, src_slots, dst_slots, style):
    dst = rng.permutation(dst_slots)[:count]
    src = rng.integers(0, src_slots, count)
    if style == "runs":  # source contiguous, destination sorted: what a busy decode server gives
        start = int(rng.integers(0, src_slots - count + 1))
        src, dst = np.arange(start, start + count), np.sort(dst)
    elif style == "reversed":
        src, dst = np.arange(count)[::-1], np.arange(count)[::-1]
    return src.astype(np.int32), dst.astype(np.int32)


def check(src: Side, dst: Side, src_pages, dst_pages, threads=1, chunk_bytes=1 << 20):
    want = reference.expected(src.layout, dst.layout, src_pages, dst_pages, src.memory, dst.memory)
    plan = make_plan(src.layout, dst.layout, src_pages, dst_pages)
    before = {region: memory.copy() for region, memory in src.memory.items()}
    moved = _core.execute_local(plan, src.memory, dst.memory, threads=threads, chunk_bytes=chunk_bytes)
    assert moved == plan.bytes
    for region, memory in want.items():
        np.testing.assert_array_equal(dst.memory[region], memory)
    for region, memory in before.items():
        np.testing.assert_array_equal(src.memory[region], memory)
    return plan


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    heads=st.sampled_from(SIZES),
    src_tp=st.sampled_from(SIZES),
    dst_tp=st.sampled_from(SIZES),
    ranks=st.tuples(st.integers(0, 7), st.integers(0, 7)),
    page_size=st.sampled_from([1, 16, 64]),
    groups=st.sampled_from([1, 2]),
    stages=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 2), st.integers(1, 3)),
    style=st.sampled_from(["random", "runs", "reversed"]),
    chunk=st.sampled_from([7, 100, 4096, 1 << 20]),
)
def test_heads_and_layers(seed, heads, src_tp, dst_tp, ranks, page_size, groups, stages, style, chunk):
    rng = np.random.default_rng(seed)
    src_rank, dst_rank = ranks[0] % src_tp, ranks[1] % dst_tp
    src_layers = [10 * i for i in range(stages[0], stages[0] + stages[1])]
    dst_layers = [10 * i for i in range(stages[2], stages[2] + stages[3])]
    src_heads = reference.heads_of(heads, src_tp, src_rank)
    dst_heads = reference.heads_of(heads, dst_tp, dst_rank)
    assume(set(src_layers) & set(dst_layers) and set(src_heads) & set(dst_heads))
    head_bytes = [int(rng.choice([1, 2, 6, 32])) for _ in range(groups)]  # K and V may differ
    common = {"page_size": page_size, "groups": groups, "total_heads": heads, "dtype": "bfloat16"}

    def side(layers, held, slots, **fields):
        sizes = [head_bytes[g] * page_size * len(held) for g in range(groups) for _ in layers]
        return place(rng, sizes, slots, layers=layers, **common, **fields)

    src = side(src_layers, src_heads, int(rng.integers(6, 9)), tp_size=src_tp, tp_rank=src_rank)
    dst = side(dst_layers, dst_heads, int(rng.integers(6, 9)), tp_size=dst_tp, tp_rank=dst_rank)
    pages = random_pages(rng, int(rng.integers(0, 7)), src.layout.slots, dst.layout.slots, style)
    check(src, dst, *pages, threads=int(rng.integers(1, 4)), chunk_bytes=chunk)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), page_size=st.sampled_from([1, 16, 64]), style=st.sampled_from(["random", "runs"]))
def test_whole_pages_of_mixed_sizes(seed, page_size, style):
    """MLA and state lists: no heads, a size per buffer, some buffers absent on both sides, any TP."""
    rng = np.random.default_rng(seed)
    sizes = [int(rng.choice([0, 1, 64, 576, 1152])) * page_size for _ in range(int(rng.integers(1, 6)))]
    src = place(rng, sizes, 9, page_size=page_size, tp_size=4, tp_rank=int(rng.integers(0, 4)))
    dst = place(rng, sizes, 12, page_size=page_size, tp_size=2, tp_rank=int(rng.integers(0, 2)))
    check(src, dst, *random_pages(rng, int(rng.integers(1, 9)), 9, 12, style))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_enough_to_stream_on_several_threads(threads):
    rng = np.random.default_rng(threads)
    sizes = [1153] * 12  # odd: pages are not aligned
    src, dst = place(rng, sizes, 700), place(rng, sizes, 800)
    pages = rng.permutation(700)[:600].astype(np.int32), rng.permutation(800)[:600].astype(np.int32)
    plan = check(src, dst, *pages, threads=threads, chunk_bytes=1 << 40)
    assert plan.bytes == 600 * 12 * 1153


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 3000), break_one_in=st.integers(1, 40))
def test_runs_are_the_longest_and_cover_every_page(seed, count, break_one_in):
    rng = np.random.default_rng(seed)
    step = np.where(rng.integers(0, break_one_in, (2, count)) == 0, rng.integers(1, 4, (2, count)), 1)
    src, dst = (np.cumsum(step, axis=1) - 1).astype(np.int32)
    if rng.integers(0, 2):  # the same moves, named in another order: whole chunks are shuffled
        order = np.concatenate(rng.permutation(np.array_split(np.arange(count), 7), axis=0)) if count % 7 == 0 else None
        src, dst = (src[order], dst[order]) if order is not None else (src[::-1].copy(), dst[::-1].copy())
    slots = int(max(src.max(), dst.max())) + 1
    layout = KvLayout(buffers=[(1, 0)], page_bytes=8, slots=slots)
    runs = make_plan(layout, layout, src, dst).runs()
    assert {tuple(int(v) for v in run) for run in runs} == reference.runs(src, dst)
    assert runs[:, 2].sum() == count
    assert (np.diff(runs[:, 1].astype(np.int64)) > 0).all(), "runs ascend by destination"


def talkers(src_tp, dst_tp, dst_rank):
    """Source ranks that serve a destination rank in SGLang."""
    if src_tp <= dst_tp:
        return [dst_rank // (dst_tp // src_tp)]
    share = src_tp // dst_tp
    return list(range(dst_rank * share, (dst_rank + 1) * share))


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("dst_tp", SIZES)
@pytest.mark.parametrize("src_tp", SIZES)
@pytest.mark.parametrize("heads", SIZES)
def test_slices_equal_sglangs_formula(heads, src_tp, dst_tp, page_size):
    """The closed form that SGLang's backends use, for every pair of ranks that talk; and who is redundant."""
    head_bytes = 32
    src_h, dst_h = max(1, heads // src_tp), max(1, heads // dst_tp)

    def layout(tp, rank, held):
        size = page_size * held * head_bytes
        return KvLayout([(1, 0)], size, 10, page_size, total_heads=heads, tp_size=tp, tp_rank=rank)

    for dst_rank in range(dst_tp):
        written = []
        for src_rank in talkers(src_tp, dst_tp, dst_rank):
            if src_tp > dst_tp:
                rep = max(1, src_tp // heads)
                src_start, n, dst_start = 0, src_h, ((src_rank // rep) * src_h) % dst_h
            else:
                rep = max(1, dst_tp // heads)
                src_start, n, dst_start = ((dst_rank // rep) * dst_h) % src_h, dst_h, 0
            pairing = pair_layouts(layout(src_tp, src_rank, src_h), layout(dst_tp, dst_rank, dst_h))
            tokens = 1 if (n == src_h == dst_h) else page_size
            assert pairing.slots_per_page == tokens
            per_slot = page_size // tokens
            row = [1, 1, src_start * head_bytes, dst_start * head_bytes, src_h * head_bytes * per_slot]
            row += [dst_h * head_bytes * per_slot, n * head_bytes * per_slot]
            assert pairing.pairs().tolist() == [row]
            if not pairing.redundant:
                written += range(dst_start, dst_start + n)
        assert sorted(written) == list(range(dst_h)), "without redundant ranks every head is written exactly once"


@pytest.mark.parametrize(("src_tp", "dst_tp"), [(1, 1), (4, 1), (4, 2), (8, 8), (2, 4)])
def test_one_replica_of_whole_pages_writes(src_tp, dst_tp):
    for dst_rank in range(dst_tp):
        dst = KvLayout([(1, 0)], 576, 10, tp_size=dst_tp, tp_rank=dst_rank)
        ranks = talkers(src_tp, dst_tp, dst_rank)
        pairings = [pair_layouts(KvLayout([(1, 0)], 576, 10, tp_size=src_tp, tp_rank=r), dst) for r in ranks]
        assert [p.redundant for p in pairings] == [False] + [True] * (len(ranks) - 1)
