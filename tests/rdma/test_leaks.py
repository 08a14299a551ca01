"""Mixed transfers, connections and registrations leave nothing behind: memory, descriptors, threads, verbs objects."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from bed import FAR, NEAR, record, resources
from ends import GUARD, TRANSPORT, Child, Pages

SIZE = 8 << 20
PAGE_SIZES = (64, 1024, 1152, 4096, 16384, 65536)
WAVE = 50
SETTLE = 30.0
GROWTH_KIB = 3072  # allocator noise; a leak of 1 KiB a transfer would be three times that


def mixed(rng: np.random.Generator, count: int) -> list[tuple[int, Pages, Pages]]:
    jobs = []
    for _ in range(count):
        page_bytes = int(rng.choice(PAGE_SIZES))
        slots = SIZE // page_bytes
        pages = int(rng.integers(1, max(2, min(slots // 4, 262144 // page_bytes))))
        src, dst = (rng.permutation(slots)[:pages].astype(np.int32) for _ in range(2))
        jobs.append((page_bytes, src, dst))
    return jobs


def wave(rng: np.random.Generator, sender: Child, receiver: Child, cancel: bool) -> None:
    jobs = mixed(rng, WAVE)
    outcomes = {outcome for outcome, _ in sender.call("move", jobs, 30.0, cancel, patience=60)}
    assert outcomes <= ({"ok", "CancelledError"} if cancel else {"ok"}), outcomes
    receiver.call("arrivals")


def cycle(sender: Child, receiver: Child) -> None:
    sender.call("disconnect")
    assert receiver.call("wait_lost", 5.0) is not None
    sender.call("register_cycle", 5)
    sender.call("connect", receiver.about)


def state(sender: Child, receiver: Child) -> dict[str, Any]:
    return {"sender": sender.call("footprint"), "receiver": receiver.call("footprint"), "verbs": resources()}


def counts(seen: dict[str, Any]) -> list[int]:
    return [seen[name][what] for name in ("sender", "receiver") for what in ("descriptors", "threads")]


def settled(sender: Child, receiver: Child, wanted: list[int]) -> dict[str, Any]:
    """`state` once descriptors and threads are as wanted, or after SETTLE seconds: the receiver's thread that took the
    last connection may end after the sender's `connect` returned."""
    deadline = time.monotonic() + SETTLE
    while counts(seen := state(sender, receiver)) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    return seen


@pytest.mark.timeout(1500)
def test_nothing_is_left_behind(full: bool, capsys: pytest.CaptureFixture[str]) -> None:
    transfers = 10_000 if full else 1_500
    rng = np.random.default_rng(4)
    nothing = resources()
    sender, receiver = Child(NEAR, SIZE), Child(FAR, SIZE)
    try:
        sender.pool[:] = rng.integers(0, 255, SIZE, dtype=np.uint8)
        receiver.pool[:] = GUARD
        sender.call("connect", receiver.about)
        for number in range(6):  # warm: every path taken once
            wave(rng, sender, receiver, cancel=number % 3 == 2)
            cycle(sender, receiver)
        time.sleep(3)  # for the thread that took the last connection
        begin = state(sender, receiver)
        for number in range(transfers // WAVE):
            wave(rng, sender, receiver, cancel=number % 10 == 9)
            if number % 5 == 4:
                cycle(sender, receiver)
        end = settled(sender, receiver, counts(begin))
        with capsys.disabled():
            print(f"\n{transfers} transfers\n  before {begin}\n  after  {end}")
        assert begin["verbs"] == end["verbs"]
        if TRANSPORT == "rdma":
            assert begin["verbs"]["qp"] > 0 and begin["verbs"]["mr"] > 0
        for name in ("sender", "receiver"):
            assert end[name]["descriptors"] == begin[name]["descriptors"], name
            assert end[name]["threads"] == begin[name]["threads"], name
            assert end[name]["resident_kib"] - begin[name]["resident_kib"] < GROWTH_KIB, name
    finally:
        sender.call("close")
        receiver.call("close")
        sender.end()
        receiver.end()
    left = resources()
    record("nothing is left behind", {"transfers": transfers, "before": begin, "after": end, "verbs_at_the_end": left})
    assert left == nothing, "closed engines left verbs objects"
