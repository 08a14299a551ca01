"""What planning costs, with bounds loose enough for a busy machine. docs/design/plan.md has the real figures.

Run as a program it prints them, medians of lists that the processor has not seen:
`python tests/python/test_plan_cost.py`.
"""

from __future__ import annotations

import time

import numpy as np

from pdxfer import _core
from pdxfer.layout import KvLayout, make_plan, pair_layouts

PAGES, BUFFERS = 32768, 160


def pairing():
    buffers = [(1 + b, 0) for b in range(BUFFERS)]
    layout = KvLayout(buffers=buffers, page_bytes=2048, slots=400_000, groups=2, total_heads=8, dtype="bfloat16")
    return pair_layouts(layout, layout)


def patterns(seed=1):
    rng = np.random.default_rng(seed)
    contiguous = np.arange(1, PAGES + 1, dtype=np.int32)
    shuffled = [rng.permutation(400_000)[:PAGES].astype(np.int32) for _ in range(2)]
    breaks = np.where(rng.random(PAGES) < 1 / 4.5, rng.integers(2, 9, PAGES), 1)
    return {
        "contiguous": (contiguous, contiguous + 1000),
        "busy decode": (contiguous, np.cumsum(breaks).astype(np.int32)),
        "random, destination sorted": (shuffled[0], np.sort(shuffled[1])),
        "random": tuple(shuffled),
    }


def best_seconds(call, times=30):
    best = 1e9
    for _ in range(times):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def test_cost_is_bounded():
    kept, pages = pairing(), patterns()
    assert best_seconds(lambda: make_plan(kept, *pages["contiguous"])) < 1e-3
    random = best_seconds(lambda: make_plan(kept, *pages["random"]))
    assert random < 20e-3
    assert random / (PAGES * BUFFERS) < 10e-9
    assert make_plan(kept, *pages["contiguous"]).run_count == 1
    assert make_plan(kept, *pages["random"]).run_count > 0.99 * PAGES


def test_int32_pages_are_not_copied():
    """Reading the arrays in place is what keeps the contiguous case flat; a conversion would show in its time."""
    kept, (src, dst) = pairing(), patterns()["contiguous"]
    in_place = best_seconds(lambda: make_plan(kept, src, dst), 100)
    converted = best_seconds(lambda: make_plan(kept, src.astype(np.int64), dst.astype(np.int64)), 100)
    assert in_place < converted


if __name__ == "__main__":
    made = pairing()
    taken = {name: [] for name in patterns()}
    for seed in range(100):
        for name, (src_pages, dst_pages) in patterns(seed).items():
            start = time.perf_counter()
            plan = _core.make_plan([(made, src_pages, dst_pages, False)])
            taken[name].append((time.perf_counter() - start, plan.run_count))
    for name, samples in taken.items():
        seconds, runs = np.median(samples, axis=0)
        each = seconds / (PAGES * BUFFERS) * 1e9
        print(f"{name:28s} {runs:8.0f} runs  {seconds * 1e6:8.1f} us  {each:.4f} ns per (page, buffer)")
