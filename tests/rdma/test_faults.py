"""Kills and cut links with transfers in flight: no hang, no wrong byte, typed errors in bound, recovery each time.

Each round connects two engines (10.77.0.1 to 10.77.0.2), verifies a transfer, submits more, breaks something at a
random moment, and looks at what became of every batch and at every byte of the receiver's pool, which the test maps.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from bed import FAR, NEAR, Link, packets, record
from ends import GUARD, TRANSPORT, Child, Pages

import pdxfer

POOL = 12 << 20
PAGE_SIZES = (1024, 1152, 4096, 16384, 65536, 1 << 20)
SETTINGS = dict(pdxfer.Config(environment=False).items())
RETRIES_S = (6 + 1) * 4.096e-6 * 2**14  # options `retry` and `timeout` at their defaults: a queue pair is found dead
# What docs/rdma.md promises of a cut link: queue pairs found dead one after the other (the second gets the first one's
# work), and from then on the peer time-out without a working one. 3.94 s with the default configuration.
CUT_PROMISE = 2 * RETRIES_S + int(SETTINGS["peer_timeout_ms"]) / 1000
KILL_BOUND = 1.0  # seconds from the signal to the last typed error, default configuration
SLACK = 2.0  # the one CPU that runs both ends, the kernel's timers and this test
PATIENCE = 20.0  # seconds after which a wait counts as a hang
STREAM = 1.0  # seconds for which a sender goes on when nothing is to fail; else until something does, or PATIENCE
# The sender that is killed submits no faster than this, so that what it was asked for takes a second or more, and the
# kill, at random in its first part, finds some of it on the way.
SLOW: dict[str, Any] = {"fault": "throttle=6MB/s", "chunk_bytes": 64 << 10}
TYPED = {"ok", "PeerLostError"}
FAULTS = ("kill receiver", "kill sender", "link down", "loss of all packets", "short outage")


@dataclass
class Ends:
    """The two ends of the rounds; an end that was killed is made anew."""

    rng: np.random.Generator
    sender: Child = field(init=False)
    receiver: Child = field(init=False)

    def __post_init__(self) -> None:
        self.make_sender()
        self.receiver = Child(FAR, POOL)

    def make_sender(self, **settings: Any) -> None:
        self.sender = Child(NEAR, POOL, **settings)
        self.sender.pool[:] = self.rng.integers(0, 255, POOL, dtype=np.uint8)

    def renew_receiver(self) -> None:
        self.receiver.end()
        self.receiver = Child(FAR, POOL)

    def renew_sender(self, **settings: Any) -> None:
        self.sender.end()
        self.make_sender(**settings)

    def end(self) -> None:
        self.sender.end()
        self.receiver.end()


Job = tuple[int, Pages, Pages]


def make_jobs(rng: np.random.Generator, count: int) -> list[Job]:
    """Batches of one page size over disjoint stretches of the receiver's pool, so that each can be judged alone."""
    jobs, stretch = [], POOL // count // (1 << 20) * (1 << 20)
    for number in range(count):
        page_bytes = int(rng.choice(PAGE_SIZES))
        slots = stretch // page_bytes
        first = -(-number * stretch // page_bytes)
        inside = (number + 1) * stretch // page_bytes - first
        pages = max(1, min(inside, int(rng.integers(slots // 4, slots + 1))))
        dst = (rng.permutation(inside)[:pages] + first).astype(np.int32)
        src = rng.permutation(POOL // page_bytes)[:pages].astype(np.int32)
        jobs.append((page_bytes, src, dst))
    return jobs


def check_bytes(ends: Ends, jobs: list[Job], outcomes: list[str]) -> list[str]:
    """A batch that was reported ok is all there; of another, any byte is either new or old; the rest is guard.

    Returns how much of each batch is there: "all", "part" or "none".
    """
    there: list[str] = []
    got, source = ends.receiver.pool, ends.sender.pool
    untouched = np.ones(POOL, bool)
    for (page_bytes, src, dst), outcome in zip(jobs, outcomes, strict=True):
        paged = POOL // page_bytes
        landed = got[: paged * page_bytes].reshape(paged, page_bytes)[dst]
        wanted = source[: paged * page_bytes].reshape(paged, page_bytes)[src]
        right = landed == wanted
        there.append("all" if right.all() else "part" if (landed != GUARD).any() else "none")
        if outcome != "ok":
            right |= landed == GUARD
        assert right.all(), f"{np.count_nonzero(~right)} wrong bytes in a batch that ended with {outcome}"
        untouched[: paged * page_bytes].reshape(paged, page_bytes)[dst] = False
    assert (got[untouched] == GUARD).all(), "a byte outside every target page changed"
    return there


def verified_transfer(ends: Ends) -> None:
    ends.receiver.pool[:] = GUARD
    jobs = make_jobs(ends.rng, 3)
    outcomes = [outcome for outcome, _ in ends.sender.call("move", jobs, PATIENCE, patience=PATIENCE + 10)]
    assert outcomes == ["ok"] * len(jobs)
    check_bytes(ends, jobs, outcomes)


def inject(kind: str, ends: Ends, link: Link) -> tuple[float, float]:
    """Returns the moments between which it struck: commands take their time beside a busy sender."""
    begin = time.monotonic()
    if kind == "kill receiver":
        ends.receiver.kill()
    elif kind == "link down":
        link.down()
    else:
        link.netem("loss 100%")
        if kind == "short outage":
            time.sleep(0.15)
            link.clear()
    return begin, time.monotonic()


def one_round(kind: str, ends: Ends, link: Link) -> tuple[float, Counter[str]]:
    """Seconds until the last end knew, and what the batches came to. Fails when that took longer than it may."""
    if kind == "kill sender":
        return kill_sender_round(ends)
    path = ends.sender.call("connect", ends.receiver.about)
    assert path.startswith(TRANSPORT), path
    verified_transfer(ends)
    ends.receiver.pool[:] = GUARD
    jobs = make_jobs(ends.rng, int(ends.rng.integers(2, 7)))
    ends.sender.start("stream", jobs, PATIENCE, STREAM if kind == "short outage" else PATIENCE)
    time.sleep(float(ends.rng.uniform(0.01, 0.15)))
    begin, done = inject(kind, ends, link)
    results = ends.sender.finish(2 * PATIENCE + 10)
    outcomes = [outcome for outcome, _ in results]
    assert set(outcomes) <= TYPED, outcomes
    late = max(moment for _, moment in results)
    if "PeerLostError" in outcomes:
        bound = KILL_BOUND if kind == "kill receiver" else CUT_PROMISE + SLACK
        assert late - done < bound, f"{kind}: the sender knew {late - done:.2f} s after it; the bound is {bound:.2f} s"
    if kind == "kill receiver":
        check_bytes(ends, jobs, outcomes)
        ends.renew_receiver()
    else:
        settle(ends, link, jobs, outcomes)
    return late - begin, Counter(outcomes)


def kill_sender_round(ends: Ends) -> tuple[float, Counter[str]]:
    """A sender dies in the middle of its batches. Once its peer is reported lost the receiver may use its memory for
    something else: nothing lands any more, only whole batches arrived, and the next sender finds a receiver that works.
    """
    ends.renew_sender(**SLOW)
    assert ends.sender.call("connect", ends.receiver.about).startswith(TRANSPORT)
    ends.receiver.call("arrivals")  # of the rounds before
    ends.receiver.pool[:] = GUARD
    jobs = make_jobs(ends.rng, int(ends.rng.integers(2, 7)))
    ends.sender.start("move", jobs, PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while (ends.receiver.pool[::64] == GUARD).all():  # slots are written from their first byte on
        assert time.monotonic() < deadline, f"hang: nothing of {len(jobs)} batches landed within {PATIENCE:g} s"
        time.sleep(0.001)
    time.sleep(float(ends.rng.uniform(0.0, 0.2)))
    begin = time.monotonic()
    ends.sender.kill()
    lost = ends.receiver.call("wait_lost", PATIENCE, patience=PATIENCE + 5)
    after = ends.receiver.pool.copy()
    assert lost is not None, f"the receiver did not notice within {PATIENCE:g} s that the sender was killed"
    assert lost - begin < KILL_BOUND, f"the receiver noticed after {lost - begin:.2f} s that the sender was killed"
    time.sleep(0.2)
    assert np.array_equal(after, ends.receiver.pool), "a byte landed after the sender was reported lost"
    arrived = dict(ends.receiver.call("arrivals"))
    outcomes = ["ok" if arrived.get(number) else "sender killed" for number in range(len(jobs))]
    there = check_bytes(ends, jobs, outcomes)
    ends.renew_sender()
    return lost - begin, Counter({"ok": outcomes.count("ok"), "sender killed in flight": there.count("part")})


def settle(ends: Ends, link: Link, jobs: list[Job], outcomes: list[str]) -> None:
    """After a cut link: repaired, nothing of a failed batch lands any more (clause 8), bytes are right."""
    if "PeerLostError" in outcomes:
        lost = ends.receiver.call("wait_lost", PATIENCE, patience=PATIENCE + 5)
        assert lost is not None, f"the receiver did not notice within {PATIENCE:g} s that the link was cut"
    before = ends.receiver.pool.copy()
    link.restore()
    time.sleep(0.2)
    assert np.array_equal(before, ends.receiver.pool), "a byte of a failed batch landed after its error"
    check_bytes(ends, jobs, outcomes)
    if "PeerLostError" not in outcomes:
        ends.sender.call("disconnect")
    assert ends.sender.call("wait_lost", 5.0) is not None
    assert ends.receiver.call("wait_lost", 5.0) is not None


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends(np.random.default_rng(20261124))
    yield made
    made.end()


@pytest.mark.timeout(1500)
def test_random_kills_and_link_cuts(ends: Ends, link: Link, full: bool, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = 100 if full else 15
    made, struck = Counter[str](), Counter[str]()
    seconds: dict[str, list[float]] = {kind: [] for kind in FAULTS}
    seen: Counter[str] = Counter()
    for number in range(rounds):
        kind = FAULTS[number] if number < len(FAULTS) else str(ends.rng.choice(FAULTS))
        late, outcomes = one_round(kind, ends, link)
        hit = any(outcome != "ok" for outcome in outcomes.elements())
        made[kind] += 1
        struck[kind] += hit
        seen += outcomes
        if hit:
            seconds[kind].append(late)
        with capsys.disabled():
            print(f"{number:3} {kind}: {late:.2f} s, {dict(+outcomes)}", flush=True)
        if kind.startswith("kill"):  # recovery at once, and not only where the next round begins
            ends.sender.call("connect", ends.receiver.about)
            verified_transfer(ends)
            ends.sender.call("disconnect")
            assert ends.receiver.call("wait_lost", 5.0) is not None
    ends.sender.call("connect", ends.receiver.about)
    verified_transfer(ends)
    facts = {
        kind: {"rounds": made[kind], "struck": struck[kind], "slowest_s": round(max(seconds[kind], default=0.0), 3)}
        for kind in FAULTS
    }
    record("random kills and link cuts", {"rounds": rounds, "batches": dict(seen), "faults": facts})
    with capsys.disabled():
        print(f"\n{rounds} rounds; batches: {dict(seen)}\n{facts}")
    for kind in ("kill receiver", "kill sender", "link down", "loss of all packets"):
        assert struck[kind] == made[kind] > 0, f"{kind}: transfers were not in flight in every round: {facts[kind]}"


@pytest.mark.parametrize("what", ["loss 1%", "delay 2ms", "delay 1ms reorder 25% 50% duplicate 1%"])
def test_a_bad_link_is_slow_and_right(ends: Ends, link: Link, what: str) -> None:
    ends.sender.call("connect", ends.receiver.about)
    link.netem(what)
    verified_transfer(ends)


def test_a_cancelled_batch_is_fenced(ends: Ends, link: Link) -> None:
    ends.sender.call("connect", ends.receiver.about)
    link.netem("delay 3ms")
    ends.receiver.pool[:] = GUARD
    jobs = make_jobs(ends.rng, 4)
    results = ends.sender.call("move", jobs, PATIENCE, True, patience=PATIENCE + 10)
    before = ends.receiver.pool.copy()
    outcomes = [outcome for outcome, _ in results]
    assert set(outcomes) <= {"ok", "CancelledError"} and "CancelledError" in outcomes
    time.sleep(0.3)
    assert np.array_equal(before, ends.receiver.pool), "a byte of a cancelled batch landed after its completion"
    check_bytes(ends, jobs, outcomes)
    link.clear()
    verified_transfer(ends)


def test_other_peers_do_not_notice(ends: Ends, link: Link) -> None:
    other = Child(NEAR, POOL)  # sends to the same receiver; the first sender is killed
    try:
        other.pool[:] = ends.sender.pool
        other.call("connect", ends.receiver.about)
        ends.sender.call("connect", ends.receiver.about)
        ends.receiver.pool[:] = GUARD
        jobs = make_jobs(ends.rng, 4)
        ends.sender.start("move", jobs[:2], PATIENCE)
        other.start("move", jobs[2:], PATIENCE)
        time.sleep(0.02)
        ends.sender.kill()
        results = other.finish(PATIENCE + 10)
        assert [outcome for outcome, _ in results] == ["ok", "ok"]
        check_bytes(ends, jobs, ["killed", "killed", "ok", "ok"])
    finally:
        other.end()


def test_a_removed_device_is_an_error_in_words(link: Link) -> None:
    """Deleting an rxe device leaves its queue pairs working, so it shows at the next start of an engine."""
    assert set(packets()) == {"rxe0", "rxe1"}
    link.remove_device("rxe0")
    with pytest.raises(RuntimeError, match=r"UnavailableError.*rdma.*rxe0"):
        Child(NEAR, 1 << 20)
