"""Two links side by side, one of which breaks: the other takes its work over, and no batch of the application knows.

Each end has two devices (rxe0 and rxe2 against rxe1 and rxe3). The engines' own connections go over loopback, as they
go over the hosts' network on machines that have NICs for RDMA alone.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from bed import Link, packets, record
from ends import GUARD, Child
from test_faults import PATIENCE, POOL, Ends, check_bytes, make_jobs, verified_transfer

HOST = "127.0.0.1"
LEAST_SHARE = 0.2  # of the packets, on each of two links that are equally good
FAULTS = ("link down", "loss of all packets", "short outage")


class TwoLinks(Ends):
    def make_sender(self, **settings: object) -> None:
        self.sender = Child(HOST, POOL, rdma="devices=rxe0;rxe2", **settings)
        self.sender.pool[:] = self.rng.integers(0, 255, POOL, dtype=np.uint8)

    def __post_init__(self) -> None:
        self.make_sender()
        self.receiver = Child(HOST, POOL, rdma="devices=rxe1;rxe3")


@pytest.fixture
def links(link: Link) -> Iterator[list[Link]]:
    """Depends on `link`, which is put back last."""
    second = Link(1)
    second.add()
    yield [link, second]
    second.restore()
    second.remove()


@pytest.fixture
def ends(links: list[Link]) -> Iterator[TwoLinks]:
    """After the links: engines end before their devices go."""
    made = TwoLinks(np.random.default_rng(20261125))
    yield made
    made.end()


def queue_pairs(path: str) -> tuple[int, int, int]:
    """Queue pairs that are up, of how many, and how often one failed so far: what explain() shows."""
    found = re.search(r"(\d+) of (\d+) queue pairs up, (\d+) failures", path)
    assert found, path
    return int(found[1]), int(found[2]), int(found[3])


def wait_for_all(ends: TwoLinks, failures: int) -> None:
    """Every queue pair is up again, without a transfer that asks for it, after `failures` of them or more.

    What explain() shows is a second old at most, so the count tells whether it was written after the fault.
    """
    deadline = time.monotonic() + PATIENCE
    while (state := queue_pairs(ends.sender.call("path")))[0] != state[1] or state[2] < failures:
        assert time.monotonic() < deadline, f"{state[0]} of {state[1]} queue pairs up after {state[2]} failures"
        time.sleep(0.05)


def shares(before: dict[str, int]) -> list[float]:
    """Of the packets that left the sender since `before`: which part went over each link."""
    sent = [packets()[device] - before[device] for device in ("rxe0", "rxe2")]
    return [count / max(1, sum(sent)) for count in sent]


def test_both_links_carry(ends: TwoLinks) -> None:
    ends.sender.call("connect", ends.receiver.about)
    before = packets()
    for _ in range(4):
        verified_transfer(ends)
    path = ends.sender.call("path")
    assert path.startswith("rdma: rxe0 port 1 to rxe1 port 1") and "; rxe2 port 1 to rxe3 port 1" in path, path
    assert queue_pairs(path)[:2] == (4, 4)
    assert min(shares(before)) > LEAST_SHARE, shares(before)


@pytest.mark.timeout(900)
def test_a_link_that_breaks_costs_no_batch(ends: TwoLinks, links: list[Link], full: bool) -> None:
    rounds = 40 if full else 6
    ends.sender.call("connect", ends.receiver.about)
    verified_transfer(ends)
    slowest, batches = 0.0, 0
    for number in range(rounds):
        kind, cut = FAULTS[number % len(FAULTS)], links[int(ends.rng.integers(2))]
        ends.receiver.pool[:] = GUARD
        jobs = make_jobs(ends.rng, int(ends.rng.integers(2, 7)))
        failures = queue_pairs(ends.sender.call("path"))[2]
        ends.sender.start("stream", jobs, PATIENCE, 1.5)
        time.sleep(float(ends.rng.uniform(0.01, 0.15)))
        begin = time.monotonic()
        if kind == "link down":
            cut.down()
        else:
            cut.netem("loss 100%")
        if kind == "short outage":
            time.sleep(0.15)
            cut.clear()
        results = ends.sender.finish(2 * PATIENCE + 10)
        outcomes = [outcome for outcome, _ in results]
        assert outcomes == ["ok"] * len(jobs), f"{kind}: {outcomes}"
        check_bytes(ends, jobs, outcomes)
        slowest = max(slowest, max(moment for _, moment in results) - begin)
        batches += len(jobs)
        cut.restore()
        time.sleep(0.1)
        check_bytes(ends, jobs, outcomes)  # what came late, over the link that is back, is nowhere
        if kind == "short outage":
            time.sleep(1.2)  # for explain()'s count, if a queue pair did fail
        wait_for_all(ends, failures if kind == "short outage" else failures + 2)  # both queue pairs of the link
    arrived = Counter(ok for _, ok in ends.receiver.call("arrivals"))
    assert set(arrived) == {True} and arrived[True] >= batches
    before = packets()
    for _ in range(4):
        verified_transfer(ends)
    assert min(shares(before)) > LEAST_SHARE, "the link that came back carries nothing"
    failures = queue_pairs(ends.sender.call("path"))[2]
    facts = {"rounds": rounds, "batches": batches, "failed_batches": 0, "failed_queue_pairs": failures}
    record("one of two links breaks", {**facts, "slowest_stream_of_1.5_s": round(slowest, 3)})
