"""The sending end: runs workloads through one library and makes a row of each.

Per repeat, in this order: the receiver spoils its sample, the ceiling is measured once, a transfer is timed, the
receiver looks at its sample; where `Settings.burst` asks for it, the sample is spoilt again, transfers are timed back
to back, and the receiver looks again. After the repeats the receiver looks at every byte of its pool.
"""

from __future__ import annotations

import contextlib
import platform
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np

from pdxfer.bench.ceiling import MemcpyCeiling, StreamCeiling
from pdxfer.bench.channel import Channel
from pdxfer.bench.cuda import Cuda
from pdxfer.bench.device_ceiling import PeerCopyCeiling, PinnedCopyCeiling, host_source
from pdxfer.bench.errors import BenchError, describe
from pdxfer.bench.memory import Content, Pool, allocate, fill_source, host_buffers, machine
from pdxfer.bench.movers import Options, Path, Sender, make_sender
from pdxfer.bench.own import OwnSender
from pdxfer.bench.workloads import RAW, Geometry, Workload, joint_runs, make_pages, pages_digest

Row = dict[str, Any]
Ceiling: TypeAlias = "MemcpyCeiling | StreamCeiling | PeerCopyCeiling | PinnedCopyCeiling"
POOL_SECONDS = 120.0  # to allocate and fill a pool of many GiB
VERIFY_SECONDS = 300.0
BURST_SECONDS = 0.25  # of a burst: a library that takes long gets shorter ones, or none
BURST_LEAST, RAMP = 5, 2  # transfers of a burst; the first of them come after a pause and are not counted
WATCH_SECONDS = 150.0


@dataclass(frozen=True)
class Settings:
    """How rows are measured. `row_seconds` bounds the repeats of a row; at least `least` are made all the same.

    `burst`: transfers back to back after each single one; 0: none.
    """

    repeats: int = 15
    warmups: int = 2
    least: int = 3
    row_seconds: float = 10.0
    verify: bool = True
    ceiling: bool = True
    burst: int = 0


@dataclass(frozen=True)
class Opened:
    """A connected sender, its path, and `verify()`: what is wrong with every byte at the receiver, or None."""

    sender: Sender
    path: Path
    verify: Callable[[], str | None]


@dataclass
class _Times:
    """Seconds. `single`: of a transfer after a pause; `hot`: of one that follows another, from the call until the
    sender was told; `notified`: from submit until the receiver's poll; `plan`: of the hot ones, where there are any."""

    single: list[float] = field(default_factory=list)
    hot: list[float] = field(default_factory=list)
    notified: list[float] = field(default_factory=list)
    plan: list[float] = field(default_factory=list)
    ceiling: list[float] = field(default_factory=list)
    one_stream: list[float] = field(default_factory=list)


class Runner:
    """Runs workloads through one library over one channel. Owns the source pool; the receiver's is made to match.

    Args:
        step: called as step(workload, fraction of the row) for the progress display.
    """

    def __init__(self, channel: Channel, settings: Settings, step: Callable[[Workload, float], None]) -> None:
        self._channel = channel
        self._settings = settings
        self._step = step
        self._pool: Pool = []
        self._pool_key: tuple[Any, ...] | None = None
        self.cuda: Cuda | None = None
        self.machine = machine()
        hello = channel.call("hello")
        self._same_host = hello["machine"] == self.machine
        self._receiver_machine = hello["machine"]

    def run(self, library: str, options: Options, works: list[Workload]) -> Iterator[Row]:
        """A row for each workload, in order. A failure becomes a row with `failed`; the next row starts afresh.

        Raises:
            BenchError: the receiving end is gone.
            ImportError: the library is not installed here.
        """
        left = list(works)
        while left:
            self._step(left[0], 0.0)
            try:
                self._make_pools(options, left[0])
                sender = self._open(library, options)
            except ImportError:
                raise
            except Exception as error:
                self.require_receiver(error)
                failing = left.pop(0)
                yield self._failed_row(library, options, failing, error)
                continue
            try:
                while left and left[0].pool_key == self._pool_key:
                    work = left.pop(0)
                    try:
                        yield self._row(library, options, sender, work)
                    except Exception as error:
                        self.require_receiver(error)
                        yield self._failed_row(library, options, work, error)
                        break
            except BaseException:
                sender.close()  # interrupted, perhaps within a message: the channel is of no use any more
                raise
            else:
                sender.close()
                self._close_receiver()

    @contextlib.contextmanager
    def opened(self, options: Options, work: Workload) -> Iterator[Opened]:
        """pdxfer connected and ready to send `work`, for a study; closed at the end, whatever happened."""
        self._make_pools(options, work)
        sender = self._open("pdxfer", options)
        try:
            pages = make_pages(work)
            self._channel.call("row", workload=work.to_json(), digest=pages_digest(*pages))
            sender.prepare(work.geometry(), *pages)
            yield Opened(sender, sender.path(), lambda: self._channel.call("verify", timeout=VERIFY_SECONDS)["wrong"])
        finally:
            sender.close()
            self._close_receiver()

    def goodbye(self) -> None:
        self._pool = []
        self._channel.call("goodbye")

    def _make_pools(self, options: Options, work: Workload) -> None:
        if options.memory == "device" and self.cuda is None:
            self.cuda = Cuda(options.device)
        if self._pool_key == work.pool_key:
            self._channel.call("reset", timeout=POOL_SECONDS)
            return
        self._pool, self._pool_key = [], None
        geometry = work.geometry()
        there = options.remote_device if options.memory == "device" else None
        self._channel.call("pool", timeout=POOL_SECONDS, workload=work.to_json(), device=there)
        self._pool = allocate(geometry.buffers, geometry.src_buffer, self.cuda)
        fill_source(self._pool, Content(work.seed, geometry.src_buffer, geometry.buffers))
        self._pool_key = work.pool_key

    def _open(self, library: str, options: Options) -> Sender:
        # The receiving end has the secret already; it never travels.
        wire = {name: value for name, value in asdict(options).items() if name not in ("secret", "host")}
        wire |= {"device": options.remote_device, "remote_device": options.device}
        sender = make_sender(library, options)
        try:
            remote = self._channel.call("open", library=library, options=wire)["remote"]
            sender.connect(self._pool, remote)
        except BaseException as error:
            sender.close()
            if isinstance(error, Exception):
                self._close_receiver()
            raise
        return sender

    def _close_receiver(self) -> None:
        self._channel.call("close")

    def require_receiver(self, error: BaseException) -> None:
        """Was it only this row, or is nobody there any more?"""
        try:
            self._channel.call("hello", timeout=30.0)
        except BenchError as gone:
            raise BenchError(f"{gone} (after: {describe(error)})") from error

    def _row(self, library: str, options: Options, sender: Sender, work: Workload) -> Row:
        geometry, pages = work.geometry(), make_pages(work)
        self._channel.call("row", workload=work.to_json(), digest=pages_digest(*pages))
        sender.prepare(geometry, *pages)
        ceiling = self._open_ceiling(sender.path(), geometry) if self._settings.ceiling else None
        try:
            times = self._repeat(sender, work, ceiling)
        finally:
            if ceiling is not None:
                ceiling.close()
        wrong = None
        if self._settings.verify:
            wrong = self._channel.call("verify", timeout=VERIFY_SECONDS)["wrong"]
        row = self.head(library, sender.path(), options, work)
        row["versions"] |= sender.versions()
        row["note"] = sender.note()
        row["verified"] = self._settings.verify and wrong is None
        row["wrong"] = wrong
        row |= _figures(times, geometry.bytes)
        row["ceiling_kind"] = ceiling.kind if ceiling else None
        return row

    def _open_ceiling(self, path: Path, geometry: Geometry) -> Ceiling | None:
        if path.transport == "rdma":
            return None  # ib_write_bw measures it, beside the bench: docs/bench.md
        if path.transport == "shm" and self.cuda is None:
            target = self._channel.call("memcpy_target", bytes=geometry.bytes)["path"]
            return MemcpyCeiling(host_buffers(self._pool), geometry.bytes, target, path.copy_threads)
        if self.cuda is not None and path.transport != "tcp":
            staged = "stag" in path.path
            kind = PinnedCopyCeiling if staged else PeerCopyCeiling
            return kind(self.cuda, self._channel, geometry.bytes)
        port = self._channel.call("stream_sink")["port"]
        source = host_source(geometry.bytes) if self.cuda is not None else host_buffers(self._pool)
        return StreamCeiling(source, geometry.bytes, self._channel.peer_host(), port, path.streams)

    def _repeat(self, sender: Sender, work: Workload, ceiling: Ceiling | None) -> _Times:
        settings, times = self._settings, _Times()
        begin, number, repeat, warmups, burst = time.monotonic(), 0, 0, settings.warmups, 0
        while len(times.single) < settings.repeats:
            spent = time.monotonic() - begin
            if spent > settings.row_seconds:
                warmups = min(warmups, repeat)  # a slow library: what was seen so far has to be warm enough
                if len(times.single) >= settings.least:
                    break
            self._step(work, repeat / (settings.warmups + settings.repeats))
            ceiling_seconds = self._spoil_and_measure(ceiling)
            start = time.perf_counter()
            planned = sender.transfer(number)
            elapsed = time.perf_counter() - start
            self._arrived(number, f"repeat {repeat}")
            number += 1
            repeat += 1
            if repeat <= warmups:
                continue
            if not times.single:
                burst = min(settings.burst, int(BURST_SECONDS / elapsed))
            times.single.append(elapsed)
            times.ceiling.append(ceiling_seconds)
            if burst >= BURST_LEAST:
                self._burst(sender, range(number, number + burst), times)
                number += burst
            else:
                times.plan.append(planned)
            if isinstance(ceiling, StreamCeiling) and len(times.one_stream) < 3:
                times.one_stream.append(ceiling.measure(streams=1))
        return times

    def _spoil_and_measure(self, ceiling: Ceiling | None) -> float:
        if self._settings.verify:
            self._channel.call("spoil")
        return ceiling.measure() if ceiling else 0.0

    def _arrived(self, number: int, which: str, check: bool = True) -> None:
        answer = self._channel.call("arrived", number=number, check=check and self._settings.verify)
        if answer["wrong"]:
            raise BenchError(f"{which}: {answer['wrong']}")

    def _burst(self, sender: Sender, numbers: range, times: _Times) -> None:
        """Transfers back to back; all have to arrive, and the sample has to be right after the last."""
        if self._settings.verify:
            self._channel.call("spoil")
        # pdxfer's arrivals are seen by the clock that both processes of a machine share
        watched = isinstance(sender, OwnSender) and self._channel.socket.family == socket.AF_UNIX
        if watched:
            self._channel.send({"do": "watch", "first": numbers.start, "count": len(numbers)})
        begins, plans, ends = [], [], []
        try:
            for number in numbers:
                begins.append(time.monotonic_ns())
                plans.append(sender.transfer(number))
                ends.append(time.monotonic_ns())
        except Exception:
            if watched:  # its answer, an error, must not be taken for another's
                with contextlib.suppress(BenchError):
                    self._channel.receive(WATCH_SECONDS)
            raise
        if watched:
            answer = self._channel.receive(WATCH_SECONDS)
            if "error" in answer:
                raise BenchError(str(answer["error"]))
            told = zip(answer["at_ns"], begins, plans, strict=True)
            times.notified += [(at - begin) / 1e9 - plan for at, begin, plan in told][RAMP:]
        for number in numbers:
            self._arrived(number, "the last of a burst", check=number == numbers[-1])
        times.hot += [(end - begin) / 1e9 for begin, end in zip(begins, ends, strict=True)][RAMP:]
        times.plan += plans[RAMP:]

    def head(self, library: str, path: Path, options: Options, work: Workload) -> Row:
        """What every row says of its workload, machines and GPUs."""
        row = head(library, path, options, work, self.machine)
        if self.cuda is not None:
            row["gpu"], row["driver"] = self.cuda.name(), self.cuda.driver_version()
        if not self._same_host:
            row["receiver_machine"] = self._receiver_machine
        return row

    def _failed_row(self, library: str, options: Options, work: Workload, error: BaseException) -> Row:
        return self.head(library, Path(options.transport, ""), options, work) | failed_figures(describe(error))


def head(library: str, path: Path, options: Options, work: Workload, machine: dict[str, object]) -> Row:
    """What a row says about the workload, whatever became of it."""
    geometry = work.geometry()
    return {
        "peer": None if library == "pdxfer" else library,
        "label": work.label,
        "transport": path.transport,
        "path": path.path,
        "reason": path.reason,
        "note": "",
        "wrong": None,
        "memory": options.memory,
        "isolated": options.isolate,
        "sm_budget": sm_budget(options),
        "model": work.model if work.model != RAW else f"raw {work.raw_bytes}",
        "page_size": work.page_size,
        "tokens": work.tokens,
        "pattern": work.pattern,
        "tp": work.tp,
        "pairs": geometry.buffers,
        "runs": len(joint_runs(*make_pages(work)).pages),
        "piece_bytes": geometry.piece * (geometry.page_size if geometry.whole else 1),
        "bytes": geometry.bytes,
        "versions": {"pdxfer": _version(), "python": platform.python_version(), "numpy": np.__version__},
        "machine": machine,
    }


def sm_budget(options: Options) -> int | None:
    """Thread blocks that the command line gave copies on a GPU; None: it gave none."""
    for option in options.settings.get("cuda", "").split(","):
        name, _, value = option.partition("=")
        if name.strip() == "sm_budget" and value.strip().isdigit():
            return int(value)
    return None


def failed_figures(reason: str) -> Row:
    """The part of a row that `_figures` fills, for a row that has none."""
    nothing: Row = dict.fromkeys(_figures(_Times([1.0], plan=[0.0], ceiling=[0.0]), 1))
    return nothing | {"repeats": 0, "burst": 0, "ceiling_kind": None, "verified": False, "failed": reason}


def _figures(times: _Times, bytes: int) -> Row:
    """Seconds to figures. GB/s are 1e9 bytes per second, from the medians."""
    taken = times.hot or times.single
    p50, p99 = (float(np.percentile(taken, q)) for q in (50, 99))
    ceiling = float(np.median(times.ceiling))
    one = bytes / min(times.one_stream) / 1e9 if times.one_stream else None
    idle = float(np.median(times.single)) if times.hot else None
    notified = float(np.median(times.notified)) if times.notified else None
    return {
        "gbps": bytes / p50 / 1e9,
        "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3,
        "plan_us": float(np.median(times.plan)) * 1e6,
        "repeats": len(times.single),
        "burst": len(times.hot) // len(times.single) + RAMP if times.hot else 0,
        "idle_ms": idle * 1e3 if idle else None,
        "idle_gbps": bytes / idle / 1e9 if idle else None,
        "notified_ms": notified * 1e3 if notified else None,
        "notified_gbps": bytes / notified / 1e9 if notified else None,
        "notified_percent": 100 * ceiling / notified if notified and ceiling else None,
        "ceiling_gbps": bytes / ceiling / 1e9 if ceiling else None,
        "ceiling_1stream_gbps": one,
        "percent_of_ceiling": 100 * ceiling / p50 if ceiling else None,
        "failed": None,
    }


def _version() -> str:
    import pdxfer

    return str(pdxfer.__version__)
