"""The Python surface of layouts and plans: what is accepted, and what each refusal says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pdxfer import _core
from pdxfer.layout import KvLayout, make_plan, pair_layouts, plan_from_extents

InvalidError = _core.InvalidError


def layout(**changes):
    fields = {"buffers": [(1, 0), (2, 0)], "page_bytes": 1024, "slots": 100, "page_size": 4, "groups": 2}
    fields |= {"total_heads": 8, "tp_size": 1, "tp_rank": 0, "dtype": "bfloat16"} | changes
    return KvLayout(**fields)


STATE = KvLayout(buffers=[(1, 0)], page_bytes=16, slots=100)


def test_layout_is_normalised_and_frozen():
    buffers = [(SimpleNamespace(id=7), np.int64(64)), (np.uint32(8), 0)]
    made = layout(buffers=buffers, page_bytes=[1024, 1024], layers=[5])
    buffers.clear()
    assert made.buffers == ((7, 64), (8, 0))
    assert made.page_bytes == (1024, 1024)
    assert made.layers == (5,)
    with pytest.raises(AttributeError):
        made.slots = 3
    assert layout() == layout()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"groups": 0}, "groups is 0"),
        ({"buffers": []}, "no buffers"),
        ({"buffers": [(1, 0)]}, "1 buffers do not divide into 2 groups"),
        ({"layers": [1, 2]}, "2 layer ids for 2 buffers in 2 groups"),
        ({"layers": []}, "layers is empty"),
        ({"page_bytes": [1, 2, 3]}, "3 page_bytes for 2 buffers"),
        ({"page_size": 0}, "page_size is 0"),
        ({"slots": 0}, "slots is 0"),
        ({"slots": -1}, "slots is -1"),
        ({"slots": 2**31}, "2147483648 pages of 4 tokens exceed"),
        ({"tp_rank": 1}, "tp_rank 1 is not below tp_size 1"),
        ({"tp_size": 0}, "tp_rank 0 is not below tp_size 0"),
        ({"total_heads": 8, "tp_size": 3}, "8 KV heads over tp_size 3"),
        ({"buffers": [(0, 0), (1, 0)]}, "region id 0"),
        ({"buffers": [(1, -4), (2, 0)]}, r"buffers\[0\] offset is -4"),
        ({"buffers": [(2**32, 0), (2, 0)]}, r"buffers\[0\] region is 4294967296"),
        ({"page_bytes": 2**62, "slots": 2**20}, "does not fit 64 bits"),
    ],
)
def test_layout_refuses(changes, text):
    with pytest.raises(InvalidError, match=text):
        layout(**changes)


@pytest.mark.parametrize("changes", [{"slots": 1.5}, {"buffers": [("a", 0), (1, 0)]}, {"page_bytes": [1.0, 2.0]}])
def test_layout_refuses_kinds(changes):
    with pytest.raises(TypeError, match="must be an integer"):
        layout(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": "float8_e4m3fn"}, "dtype: source 'bfloat16', destination 'float8_e4m3fn'"),
        ({"page_size": 2}, "page_size: source 4, destination 2"),
        ({"groups": 1}, "groups: source 2, destination 1"),
        ({"total_heads": 4}, "total_heads: source 8, destination 4"),
        ({"page_bytes": 512}, "32 bytes per head and token.*16"),
        ({"page_bytes": 1000}, "pages of 1000 bytes, which 4 tokens x 8 heads do not divide"),
        ({"layers": [9]}, "no layer in common"),
        ({"buffers": [(1, 0), (1, 512)]}, "must not overlap"),
        ({"buffers": [(1, 0), (1, 0)]}, "must not overlap"),
    ],
)
def test_pairing_refuses(changes, text):
    with pytest.raises(InvalidError, match=text):
        pair_layouts(layout(), layout(**changes))


def test_pairing_refuses_repeated_layers():
    repeated = layout(buffers=[(r, 0) for r in (1, 2, 3, 4)], layers=[5, 5])
    single = layout(layers=[5])
    with pytest.raises(InvalidError, match="source layout names layer 5 twice"):
        pair_layouts(repeated, single)
    with pytest.raises(InvalidError, match="destination layout names layer 5 twice"):
        pair_layouts(single, repeated)


def test_pairing_refuses_ranks_without_a_common_head():
    src = layout(tp_size=4, tp_rank=3, page_bytes=256)
    dst = layout(tp_size=2, tp_rank=0, page_bytes=512)
    with pytest.raises(InvalidError, match=r"rank 3 of 4 holds KV heads \[6, 8\).*rank 0 of 2 \[0, 4\).*share none"):
        pair_layouts(src, dst)


def test_pairing_refuses_whole_pages_of_two_sizes():
    wide = KvLayout(buffers=[(1, 0)], page_bytes=32, slots=100)
    with pytest.raises(InvalidError, match="16 bytes per page.*32"):
        pair_layouts(STATE, wide)
    absent = KvLayout(buffers=[(1, 0)], page_bytes=0, slots=100)
    with pytest.raises(InvalidError, match="16 bytes per page.*0"):
        pair_layouts(STATE, absent)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, np.int16, np.uint64, ">i4", "<i4", ">i8"])
@pytest.mark.parametrize("stride", [1, 2])
def test_integer_arrays_of_any_kind_are_taken(dtype, stride):
    src = np.arange(0, 20, dtype=dtype)[::stride]
    dst = np.arange(40, 60, dtype=dtype)[::stride]
    plan = make_plan(STATE, STATE, src, dst)
    want = [[0, 40, 20]] if stride == 1 else [[i, 40 + i, 1] for i in range(0, 20, 2)]
    assert plan.runs().tolist() == want
    assert plan.bytes == len(src) * 16


def test_lists_and_empty_arrays_are_taken():
    assert make_plan(STATE, STATE, [3, 4], (7, 8)).runs().tolist() == [[3, 7, 2]]
    empty = make_plan(STATE, STATE, [], np.zeros(0, np.int32))
    assert (empty.bytes, empty.pair_count, empty.run_count) == (0, 0, 0)
    assert empty.runs().shape == (0, 3)
    assert _core.execute_local(empty, {}, {}) == 0


@pytest.mark.parametrize("bad", [np.zeros(2, np.float32), [0.5, 1], np.zeros(2, bool), "ab", object()])
def test_pages_that_are_no_integers_are_type_errors(bad):
    with pytest.raises(TypeError, match=r"src_pages (has dtype|must be)"):
        make_plan(STATE, STATE, bad, [1, 2])


def test_pages_in_two_dimensions_are_refused():
    with pytest.raises(InvalidError, match="dst_pages has 2 dimensions"):
        make_plan(STATE, STATE, [1, 2], np.zeros((2, 1), np.int32))


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("at", [0, 1, 9, 17, 2999])
@pytest.mark.parametrize(("side", "value"), [("src", -3), ("src", 4000), ("dst", -1), ("dst", 2**31 - 1)])
def test_the_first_page_out_of_range_is_named(dtype, at, side, value):
    wide = KvLayout(buffers=[(1, 0)], page_bytes=16, slots=4000)
    pages = {"src": np.arange(3000, dtype=dtype), "dst": np.arange(3000, dtype=dtype)}
    pages[side][at] = value
    pages[side][at + 1 :: 7] = value - (value > 0)
    with pytest.raises(InvalidError, match=rf"{side}_pages\[{at}\] is {value}, .* has 4000 pages"):
        make_plan(wide, wide, pages["src"], pages["dst"])


def test_pages_past_32_bits_are_not_truncated():
    with pytest.raises(InvalidError, match=r"dst_pages\[1\] is 4294967298"):
        make_plan(STATE, STATE, [1, 2], np.array([1, 2**32 + 2]))


def test_unequal_lengths_are_refused():
    with pytest.raises(InvalidError, match="src_pages has 2 entries and dst_pages 3"):
        make_plan(STATE, STATE, [1, 2], [1, 2, 3])


@pytest.mark.parametrize("dst", [[5, 6, 7, 5], [7, 5, 6, 6], [1, 2, 3, 1]])
def test_a_repeated_destination_is_refused_unless_allowed(dst):
    with pytest.raises(InvalidError, match=r"dst_pages\[3\] is \d, and so is dst_pages"):
        make_plan(STATE, STATE, [1, 2, 3, 4], dst)
    assert make_plan(STATE, STATE, [1, 2, 3, 4], dst, allow_duplicates=True).bytes == 64
    assert make_plan(STATE, STATE, [4, 4, 4], [1, 2, 3]).run_count == 3, "a source may be read often"


def test_parts_form_one_plan():
    kv, state = pair_layouts(layout(), layout()), pair_layouts(STATE, STATE)
    plan = make_plan(parts=[(kv, [1, 2], [3, 4]), (state, [9, 9], [5, 5], True)])
    assert (plan.copies, plan.pair_count, plan.run_count) == (2, 3, 3)
    assert plan.bytes == 2 * 2 * 1024 + 2 * 16
    assert plan.runs(1).tolist() == [[9, 5, 1], [9, 5, 1]]
    assert plan.pairs(0).shape == (2, 7)
    with pytest.raises(InvalidError, match="copy 2 of a plan of 2"):
        plan.runs(2)
    assert "2 copies" in repr(plan)


def test_wrong_calls_are_type_errors():
    pairing = pair_layouts(STATE, STATE)
    for call in (
        lambda: make_plan(pairing, [1]),
        lambda: make_plan(STATE, [1], [2]),
        lambda: make_plan(pairing, pairing, [1], [2]),
        lambda: make_plan(pairing, [1], [2], parts=[]),
        lambda: make_plan(parts=[(None, [1], [2])]),
    ):
        with pytest.raises(TypeError):
            call()


def test_extents_merge_where_both_sides_continue():
    plan = plan_from_extents([1, 1, 1, 2], [0, 10, 30, 40], [5, 5, 5, 5], [100, 110, 120, 130], [10, 10, 10, 0])
    assert plan.pairs().tolist() == [[1, 5, 0, 100, 20, 20, 20], [1, 5, 30, 120, 10, 10, 10]]
    assert plan.runs().tolist() == [[0, 0, 1]]
    src = {1: np.arange(64, dtype=np.uint8)}
    dst = {5: np.zeros(200, np.uint8)}
    assert _core.execute_local(plan, src, dst, chunk_bytes=3) == 30
    want = np.zeros(200, np.uint8)
    want[100:120], want[120:130] = np.arange(20), np.arange(30, 40)
    np.testing.assert_array_equal(dst[5], want)


def test_extents_refuse():
    with pytest.raises(InvalidError, match="unequal length: src_ids 1"):
        plan_from_extents([1], [0, 1], [1, 1], [0, 1], [1, 1])
    with pytest.raises(InvalidError, match=r"src_ids\[0\] is -1"):
        plan_from_extents([-1], [0], [1], [0], [1])
    with pytest.raises(InvalidError, match="does not fit 64 bits"):
        plan_from_extents([1], np.array([2**64 - 1], np.uint64), [1], [0], [2])
    with pytest.raises(TypeError, match="lengths has dtype float64"):
        plan_from_extents([1], [0], [1], [0], [1.0])


def test_execute_local_refuses_what_does_not_fit():
    plan = make_plan(STATE, STATE, [99], [99])
    full, short = np.zeros(1600, np.uint8), np.zeros(1599, np.uint8)
    assert _core.execute_local(plan, {1: full}, {1: full.copy()}) == 16
    with pytest.raises(InvalidError, match="source slot outside"):
        _core.execute_local(plan, {1: short}, {1: full})
    with pytest.raises(InvalidError, match="destination slot outside"):
        _core.execute_local(plan, {1: full}, {1: short})
    with pytest.raises(InvalidError, match="unknown region"):
        _core.execute_local(plan, {2: full}, {1: full})
    with pytest.raises(InvalidError, match="chunk_bytes is 0"):
        _core.execute_local(plan, {1: full}, {1: full}, chunk_bytes=0)
    with pytest.raises(InvalidError, match="not contiguous"):
        _core.execute_local(plan, {1: np.zeros(3200, np.uint8)[::2]}, {1: full})
    with pytest.raises(TypeError, match="does not give a buffer"):
        _core.execute_local(plan, {1: 5}, {1: full})
    readonly = full.copy()
    readonly.flags.writeable = False
    with pytest.raises((BufferError, ValueError)):
        _core.execute_local(plan, {1: full}, {1: readonly})
