"""Transfers back to back, as the bench times them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from bench_library import Library, run

from pdxfer.bench import own, runner
from pdxfer.bench.channel import Channel
from pdxfer.bench.errors import BenchError
from pdxfer.bench.movers import Options
from pdxfer.bench.own import OwnReceiver
from pdxfer.bench.runner import Runner, Settings
from pdxfer.bench.worker import open_channel, stop
from pdxfer.bench.workloads import Workload

WORK = Workload("Qwen2.5-7B", 16, 128, "random", 512)
BURSTS = Settings(repeats=2, warmups=1, burst=6)


def test_bursts_are_the_figures_and_single_transfers_stand_beside_them(
    channel: Channel, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "BURST_SECONDS", 600.0)  # however slow the machine is now
    (row,) = run(channel, [WORK], BURSTS)
    assert row["verified"] and row["burst"] == 6 and row["repeats"] == 2
    assert library.transfers == 1 + 2 * (1 + 6)
    assert row["idle_gbps"] == pytest.approx(row["bytes"] / row["idle_ms"] / 1e6)
    assert row["gbps"] == pytest.approx(row["bytes"] / row["p50_ms"] / 1e6)
    assert row["notified_ms"] is None  # another library's arrivals are not watched


def test_a_library_too_slow_for_bursts_gets_single_transfers(
    channel: Channel, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "BURST_SECONDS", 0.0)
    (row,) = run(channel, [WORK], BURSTS)
    assert row["burst"] == 0 and row["idle_ms"] is None and library.transfers == 3 and row["gbps"] > 0


@pytest.mark.parametrize(
    ("fault", "text"),
    [("lazy burst", "the last of a burst: .*had not arrived"), ("raises in a burst", "TimeoutError: took too long")],
)
def test_a_burst_that_fails_fails_the_row(
    channel: Channel, library: Library, monkeypatch: pytest.MonkeyPatch, fault: str, text: str
) -> None:
    monkeypatch.setattr(runner, "BURST_SECONDS", 600.0)
    library.fault = fault
    (row,) = run(channel, [WORK], BURSTS)
    assert row["failed"] and re.search(text, row["failed"]) and row["gbps"] is None


def test_the_engines_arrivals_of_a_burst_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "BURST_SECONDS", 600.0)
    options = Options("shm")
    channel, process = open_channel(options, None, "test")
    try:
        bench = Runner(channel, BURSTS, lambda work, fraction: None)
        (row,) = bench.run("pdxfer", options, [WORK])
        bench.goodbye()
    finally:
        channel.close()
        stop(process)
    assert row["failed"] is None and row["verified"] and row["burst"] == 6
    assert row["notified_ms"] > 0 and row["notified_gbps"] == pytest.approx(row["bytes"] / row["notified_ms"] / 1e6)
    assert row["notified_percent"] == pytest.approx(100 * row["notified_gbps"] / row["ceiling_gbps"])


def test_a_notice_counts_for_one_transfer_though_rows_use_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[int]] = []

    class Engine:
        def poll(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(ok=True, tag=own._TAG + number) for number in (told.pop(0) if told else [])]

    monkeypatch.setattr(own.pdxfer, "Engine", lambda config: Engine())
    receiver = OwnReceiver(Options("shm"))
    told[:] = [[0], [1], [2]]
    receiver.arrived(0)
    assert len(receiver.watch(1, 2)) == 2
    for number in (1, 2):
        receiver.arrived(number)
    told[:] = [[], [0], [2], [1]]  # the next row's; 2 before 1
    receiver.arrived(0)
    assert len(told) == 2, "the first row's notice was taken for the second's"
    one, two = receiver.watch(1, 2)
    assert not told and one >= two
    monkeypatch.setattr(own, "NOTICE_SECONDS", 0.05)
    with pytest.raises(BenchError, match="no notice of arrival within 0.05 s"):
        receiver.arrived(3)
