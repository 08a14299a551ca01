"""The bench's workloads: sizes of real models, page patterns, shares of heads, and what fits the memory."""

from __future__ import annotations

import numpy as np
import pytest

from pdxfer.bench.arguments import DEFAULT_TABLE, Memory, parser, shapes_of, transports_of, workloads
from pdxfer.bench.errors import BenchError
from pdxfer.bench.workloads import (
    PATTERNS,
    RAW,
    Workload,
    busy_run,
    find_model,
    joint_runs,
    make_pages,
    pages_digest,
    workload_from_json,
)

GIB = 1 << 30


@pytest.mark.parametrize(
    ("name", "tp", "token_bytes", "buffers", "bytes_32k"),
    [
        ("Qwen2.5-7B", 1, 1024, 56, int(1.75 * GIB)),
        ("Qwen2.5-7B", 2, 512, 56, 896 << 20),
        ("Llama-3.1-8B", 1, 2048, 64, 4 * GIB),
        ("Llama-3.1-70B", 8, 256, 160, int(1.25 * GIB)),
        ("Qwen3-30B", 1, 1024, 96, 3 * GIB),
        ("Qwen3-235B", 4, 256, 188, 188 * 256 * 32768),
        ("DeepSeek-V3", 8, 1152, 61, 61 * 1152 * 32768),
    ],
)
def test_sizes_of_real_models(name: str, tp: int, token_bytes: int, buffers: int, bytes_32k: int) -> None:
    geometry = Workload(name, 64, 32768, "random", 32768, src_tp=tp, dst_tp=tp).geometry()
    assert geometry.src_token == geometry.dst_token == token_bytes
    assert geometry.buffers == buffers
    assert geometry.bytes == bytes_32k
    assert geometry.whole


def test_model_names() -> None:
    assert find_model("qwen2.5-7b").name == "Qwen2.5-7B"
    assert find_model("Qwen3-235B-A22B").name == "Qwen3-235B"
    assert find_model("deep").name == "DeepSeek-V3"
    with pytest.raises(BenchError, match="several"):
        find_model("Qwen")
    with pytest.raises(BenchError, match="no such model; known: Qwen2.5-7B"):
        find_model("gpt-2")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("factor", [4, 1.25])
def test_pages_are_in_range_and_unique(pattern: str, page_size: int, factor: float) -> None:
    work = Workload("Qwen2.5-7B", page_size, 4096, pattern, int(4096 * factor))
    src, dst = make_pages(work)
    geometry = work.geometry()
    for pages, slots in ((src, geometry.src_slots), (dst, geometry.dst_slots)):
        assert pages.dtype == np.int32 and len(pages) == geometry.pages
        assert len(np.unique(pages)) == len(pages)
        assert pages.min() >= 0 and pages.max() < slots
    again = make_pages(work)
    assert pages_digest(src, dst) == pages_digest(*again)
    assert pages_digest(src, dst) != pages_digest(dst, src)


def test_patterns_have_the_runs_they_promise() -> None:
    def runs(pattern: str, page_size: int = 1) -> int:
        work = Workload("Qwen2.5-7B", page_size, 16384, pattern, 65536)
        return len(joint_runs(*make_pages(work)).pages)

    assert runs("contiguous") == 1
    assert runs("random") > 16000
    assert 16384 / runs("busy-decode") == pytest.approx(4.5, rel=0.1)
    assert 16384 / 16 / runs("busy-decode", 16) == pytest.approx(4.2, rel=0.2)
    assert busy_run(1) == 4.5 and busy_run(64) == 3.6 and 3.6 < busy_run(32) < 4.2


def test_busy_decode_has_a_contiguous_source() -> None:
    src, dst = make_pages(Workload("Qwen2.5-7B", 1, 1000, "busy-decode", 4000))
    assert (np.diff(src) == 1).all()
    assert (np.diff(dst) > 0).all() and (np.diff(dst) > 1).any()


def test_joint_runs_rebuild_the_pages() -> None:
    rng = np.random.default_rng(3)
    src, dst = (np.sort(rng.permutation(300)[:200]).astype(np.int32) for _ in range(2))
    runs = joint_runs(src, dst)
    for pages, firsts in ((src, runs.src), (dst, runs.dst)):
        rebuilt = [first + i for first, count in zip(firsts, runs.pages, strict=True) for i in range(count)]
        assert rebuilt == pages.tolist()
    assert len(joint_runs(src[:0], dst[:0]).pages) == 0


@pytest.mark.parametrize(("src_tp", "dst_tp", "piece", "skips"), [(2, 1, 512, (0, 512)), (1, 4, 256, (768, 0))])
def test_unequal_ranks_send_their_common_heads(src_tp: int, dst_tp: int, piece: int, skips: tuple[int, int]) -> None:
    geometry = Workload("Qwen2.5-7B", 16, 64, "random", 256, src_tp=src_tp, dst_tp=dst_tp).geometry()
    assert (geometry.piece, (geometry.src_skip, geometry.dst_skip)) == (piece, skips)
    assert geometry.bytes == 56 * 64 * piece
    assert not geometry.whole


@pytest.mark.parametrize(
    ("work", "text"),
    [
        (Workload("Qwen2.5-7B", 1, 4, "zigzag", 16), "--pattern zigzag"),
        (Workload("Qwen2.5-7B", 16, 100, "random", 400), "multiple of the page size"),
        (Workload("Qwen2.5-7B", 1, 100, "random", 50), "fit the pool"),
        (Workload("Qwen2.5-7B", 1, 4, "random", 16, src_tp=3), "4 KV heads"),
        (Workload("Qwen2.5-7B", 1, 4, "random", 16, src_tp=8), "4 KV heads"),
        (Workload(RAW, 1, 4, "random", 16), "--raw 0"),
        (Workload(RAW, 16, 16, "random", 16, raw_bytes=8), "page size 1"),
    ],
)
def test_contradictions_are_refused(work: Workload, text: str) -> None:
    with pytest.raises(BenchError, match=text):
        work.geometry()


def test_workloads_travel_as_json() -> None:
    work = Workload("DeepSeek-V3", 64, 128, "busy-decode", 512, seed=7)
    assert workload_from_json(work.to_json()) == work
    with pytest.raises(BenchError, match="does not know"):
        workload_from_json({**work.to_json(), "colour": "red"})


def test_default_table_covers_what_the_readme_claims() -> None:
    args = parser().parse_args([])
    assert shapes_of(args) == list(DEFAULT_TABLE)
    assert transports_of(args) == ["shm", "tcp"]
    works, notes = workloads(args, ["shm", "tcp"], Memory(64 * GIB))
    assert notes == []
    assert all(100e6 <= work.geometry().bytes <= 256e6 for work in works["shm"])
    assert all(25e6 <= work.geometry().bytes <= 80e6 for work in works["tcp"])
    assert all(work.pool_tokens >= 4 * work.tokens for works_ in works.values() for work in works_)
    # one pool per family, whatever the transport and page size
    assert len({work.pool_key for works_ in works.values() for work in works_}) == 4


def test_options_multiply() -> None:
    args = parser().parse_args(
        ["--model", "qwen3-30", "--model", "llama-3.1-8b", "--page-size", "1,16", "--pattern", "random,contiguous"]
    )
    assert len(shapes_of(args)) == 8
    args = parser().parse_args(["--raw", "4KiB", "--raw", "100"])
    assert [shape.raw_bytes for shape in shapes_of(args)] == [4096, 100]
    with pytest.raises(BenchError, match="--raw moves blocks"):
        shapes_of(parser().parse_args(["--raw", "4096", "--tp", "2:1"]))
    with pytest.raises(BenchError, match="SRC:DST"):
        shapes_of(parser().parse_args(["--tp", "2"]))
    with pytest.raises(BenchError, match="expected shm, tcp, rdma, auto"):
        transports_of(parser().parse_args(["--transport", "nccl"]))


@pytest.mark.parametrize("memory", [Memory(8 * GIB), Memory(1 * GIB), Memory(8 * GIB, 1 * GIB)])
def test_rows_shrink_to_the_memory_and_say_so(memory: Memory) -> None:
    args = parser().parse_args(["--model", "Llama-3.1-70B", "--page-size", "16", "--tokens", "32768"])
    works, notes = workloads(args, ["shm"], memory)
    (work,) = works["shm"]
    geometry = work.geometry()
    source, target = (geometry.buffers * size for size in (geometry.src_buffer, geometry.dst_buffer))
    assert source + target < memory.sender if memory.receiver is None else target < memory.receiver
    assert work.tokens < 32768 and work.tokens % 16 == 0 and work.pool_tokens > work.tokens
    assert len(notes) == 1 and f"{work.tokens} tokens instead of 32768" in notes[0]
    with pytest.raises(BenchError, match="fit the available memory"):
        workloads(args, ["shm"], Memory(1 << 20))
