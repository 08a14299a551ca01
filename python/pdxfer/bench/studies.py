"""What a row of the table does not say: latency at the receiver, both directions at once, and what the model notices.

The sending end's part; bench/study_session.py is the other's. Only between two processes of one machine, whose
monotonic clocks are the same clock. A study makes rows of its own, with "study" set.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from pdxfer.bench.channel import Channel
from pdxfer.bench.errors import BenchError
from pdxfer.bench.load import COMPUTE, Compute, Repeated
from pdxfer.bench.movers import Options, Path
from pdxfer.bench.runner import Row, Runner
from pdxfer.bench.study_session import DUPLEX_AT_ONCE, CopyLoop, StudySession
from pdxfer.bench.workloads import Workload, make_pages, pages_digest

LATENCY_TOKENS = (1, 16, 128, 512, 2048)
WARM = 30
LATENCY_GAPS = ((0.0005, 500), (0.02, 100))  # seconds between requests, workers awake or asleep; repeats of each
LOAD_SECONDS = 1.5


class Studies:
    """Runs them with pdxfer over the runner's channel.

    Args:
        local: this process as a receiving end, for the second direction.
    """

    def __init__(self, runner: Runner, channel: Channel, local: StudySession) -> None:
        self._runner, self._channel, self._local = runner, channel, local
        self._first = 0  # number of the next transfer beside a loop

    def run(self, name: str, options: Options, work: Workload) -> Iterator[Row]:
        if name == "latency":
            for tokens in (count for count in LATENCY_TOKENS if count <= work.pool_tokens):
                for gap, repeats in LATENCY_GAPS:
                    yield self.latency(options, replace(work, tokens=tokens), gap, repeats)
        elif name == "duplex":
            yield self.duplex(options, work)
        else:
            yield from self.interference(options, work)

    def latency(self, options: Options, work: Workload, gap: float, repeats: int) -> Row:
        """From the call of submit until poll() of the receiving end had the notice; the plan is made before it."""
        with self._runner.opened(options, work) as opened:
            for number in range(WARM):
                opened.sender.transfer(number)
                self._channel.call("arrived", number=number, check=False)
            self._channel.call("spoil")
            self._channel.send({"do": "watch", "first": WARM, "count": repeats})
            begins, plans, sent = [], [], []
            for number in range(WARM, WARM + repeats):
                time.sleep(gap)
                begin = time.monotonic_ns()
                plans.append(opened.sender.transfer(number))
                sent.append((time.monotonic_ns() - begin) / 1e3)
                begins.append(begin)
            answer = self._channel.receive(60.0)
            if "error" in answer:
                raise BenchError(str(answer["error"]))
            plan = np.array(plans) * 1e6
            told = (np.array(answer["at_ns"]) - np.array(begins)) / 1e3
            wrong = opened.verify()
            row = self._row("latency", options, opened.path, work)
        return row | {
            "repeats": repeats,
            "gap_ms": gap * 1e3,
            "notified_us": _quantiles(told - plan),
            "call_to_notified_us": _quantiles(told),
            "acknowledged_us": _quantiles(np.array(sent)),
            "plan_us": float(np.median(plan)),
            "verified": wrong is None,
            "wrong": wrong,
        }

    def duplex(self, options: Options, work: Workload) -> Row:
        """Each end sends to the other, two requests at a time; and one copy engine each way, for comparison."""
        back = self._local.options_back(options)
        with self._runner.opened(options, work) as opened:
            self._local.do_pool(work.to_json(), device=options.device if options.memory == "device" else None)
            self._local.open_own(options)
            self._channel.call("load_open", timeout=120.0, options=back, workload=work.to_json(), **self._local.remote)
            pages = make_pages(work)
            self._local.do_row(work.to_json(), pages_digest(*pages))
            forward = Repeated(opened.sender.transfer, at_once=DUPLEX_AT_ONCE)
            try:
                alone = forward.during(LOAD_SECONDS / 2)
                self._channel.call("load_start")
                both = forward.during(LOAD_SECONDS, first=1 << 20)
                other = float(self._channel.call("load_stop")["per_second"])
                ceiling = self._two_way_ceiling() if self._runner.cuda is not None else None
                wrong = opened.verify() or self._local.do_verify()["wrong"]
            finally:
                self._channel.call("load_close")
                self._local.do_close()
            row = self._row("duplex", options, opened.path, work)
        size = row["bytes"] / 1e9
        total = (both + other) * size
        return row | {
            "at_once": DUPLEX_AT_ONCE,
            "alone_gbps": alone * size,
            "forward_gbps": both * size,
            "back_gbps": other * size,
            "gbps": total,
            "ceiling_gbps": ceiling,
            "percent_of_ceiling": 100 * total / ceiling if ceiling else None,
            "verified": wrong is None,
            "wrong": wrong,
        }

    def _two_way_ceiling(self) -> float:
        """GB/s of copies of 1 GiB by both GPUs' copy engines at once."""
        assert self._runner.cuda is not None
        cuda = self._runner.cuda
        mine = CopyLoop(cuda)
        mine.open(self._channel.call("copy_loop_make")["handle"])
        self._channel.call("copy_loop_open", handle=mine.handle)
        try:
            self._channel.call("copy_loop_start")
            here = mine.loop.during(LOAD_SECONDS / 2)
            there = float(self._channel.call("copy_loop_stop")["per_second"])
        finally:
            self._channel.call("copy_loop_close")
            mine.close()
        return (here + there) * mine.bytes / 1e9

    def interference(self, options: Options, work: Workload) -> Iterator[Row]:
        """How much longer a loop takes on either GPU while transfers, or the driver's copies, run back to back."""
        if self._runner.cuda is None:
            raise BenchError("the interference study is of GPUs: it goes with --memory device")
        copies = CopyLoop(self._runner.cuda)
        copies.open(self._channel.call("copy_loop_make")["handle"])
        try:
            with self._runner.opened(options, work) as opened:
                loads = ((Repeated(opened.sender.transfer), work.geometry().bytes), (copies.loop, copies.bytes))
                for kind in COMPUTE:
                    compute = Compute(kind, options.device)
                    self._channel.call("compute_open", timeout=120.0, kind=kind, device=options.remote_device)
                    for where in ("sender", "receiver"):
                        row = self._row("interference", options, opened.path, work)
                        row |= self._beside(compute if where == "sender" else None, loads)
                        yield row | {"loop": kind, "where": where, "verified": False}
                    del compute
                    self._channel.call("compute_close")
        finally:
            self._channel.call("copy_loop_close")
            copies.close()

    def _beside(self, compute: Compute | None, loads: tuple[tuple[Repeated, int], tuple[Repeated, int]]) -> Row:
        """The loop, here or (None) at the other end: alone, beside each load, and alone again."""

        def measure() -> float:
            if compute is not None:
                return compute.milliseconds(LOAD_SECONDS)
            return float(self._channel.call("compute", timeout=60.0, seconds=LOAD_SECONDS)["milliseconds"])

        before, found = measure(), []
        for load, size in loads:
            load.start(self._first)
            took = measure()
            seconds = load.stop()
            self._first += load.count  # transfers are numbered on
            found.append((took, size * load.count / seconds / 1e9))
        alone = (before + measure()) / 2
        (loaded, rate), (copied, copy_rate) = found
        return {
            "alone_ms": alone,
            "loaded_ms": loaded,
            "slowdown_percent": 100 * (loaded / alone - 1),
            "gbps": rate,
            "copy_slowdown_percent": 100 * (copied / alone - 1),
            "copy_gbps": copy_rate,
        }

    def _row(self, study: str, options: Options, path: Path, work: Workload) -> Row:
        return {"study": study, "failed": None} | self._runner.head("pdxfer", path, options, work)


def _quantiles(microseconds: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> dict[str, float]:
    return {name: float(np.percentile(microseconds, q)) for name, q in (("p50", 50), ("p90", 90), ("p99", 99))}


def text(rows: list[Row]) -> str:
    """The studies' rows as lines, a section each."""
    lines: list[str] = []
    for row in rows:
        budget = f", {row['sm_budget']} blocks" if row.get("sm_budget") else ""
        name = f"{row['study']}: {row['transport']}{budget}, {row['label']}, {row['bytes'] / 1e6:.1f} MB"
        if row["failed"]:
            lines.append(f"{name}: FAILED: {row['failed']}")
        elif row["study"] == "latency":
            told, back = row["notified_us"], row["acknowledged_us"]
            name = f"{name}, {row['gap_ms']:g} ms apart"
            lines.append(
                f"{name}: submit to notified p50 {told['p50']:.0f} us, p99 {told['p99']:.0f}; call to acknowledged p50 "
                f"{back['p50']:.0f}, p99 {back['p99']:.0f}; plan {row['plan_us']:.0f}; {_checked(row)}"
            )
        elif row["study"] == "duplex":
            share = f", {row['percent_of_ceiling']:.0f}% of {row['ceiling_gbps']:.0f}" if row["ceiling_gbps"] else ""
            lines.append(
                f"{name}: both ways {row['gbps']:.1f} GB/s ({row['forward_gbps']:.1f} + {row['back_gbps']:.1f})"
                f"{share}; one way alone {row['alone_gbps']:.1f}; {_checked(row)}"
            )
        else:
            lines.append(
                f"{name}: {row['loop']} at the {row['where']} {row['alone_ms']:.3f} ms alone, {row['loaded_ms']:.3f} "
                f"under {row['gbps']:.0f} GB/s: {row['slowdown_percent']:+.1f}%; under {row['copy_gbps']:.0f} GB/s of "
                f"cudaMemcpyPeer: {row['copy_slowdown_percent']:+.1f}%"
            )
    return "\n".join(lines)


def _checked(row: Row) -> str:
    return "checked" if row["verified"] else f"WRONG: {row['wrong']}"
