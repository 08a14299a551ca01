"""The sending end: runs workloads through one library and makes a row of each.

Per repeat, in this order: the receiver spoils its sample, the ceiling is measured once, the transfer is timed, the
receiver looks at its sample. After the repeats the receiver looks at every byte of its pool.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np

from pdxfer.bench.ceiling import MemcpyCeiling, StreamCeiling
from pdxfer.bench.channel import Channel
from pdxfer.bench.cuda import Cuda
from pdxfer.bench.device_ceiling import PeerCopyCeiling, PinnedCopyCeiling, host_source
from pdxfer.bench.errors import BenchError, describe
from pdxfer.bench.memory import Content, Pool, allocate, fill_source, host_buffers, machine
from pdxfer.bench.movers import Options, Path, Sender, make_sender
from pdxfer.bench.workloads import RAW, Geometry, Workload, joint_runs, make_pages, pages_digest

Row = dict[str, Any]
Ceiling: TypeAlias = "MemcpyCeiling | StreamCeiling | PeerCopyCeiling | PinnedCopyCeiling"
POOL_SECONDS = 120.0  # to allocate and fill a pool of many GiB
VERIFY_SECONDS = 300.0


@dataclass(frozen=True)
class Settings:
    """How rows are measured. `row_seconds` bounds the repeats of a row; at least `least` are made all the same."""

    repeats: int = 15
    warmups: int = 2
    least: int = 3
    row_seconds: float = 10.0
    verify: bool = True
    ceiling: bool = True


@dataclass(frozen=True)
class Opened:
    """A connected sender, its path, and `verify()`: what is wrong with every byte at the receiver, or None."""

    sender: Sender
    path: Path
    verify: Callable[[], str | None]


@dataclass
class _Times:
    transfer: list[float]
    plan: list[float]
    ceiling: list[float]
    one_stream: list[float]


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
        settings, times = self._settings, _Times([], [], [], [])
        begin, number, warmups = time.monotonic(), 0, settings.warmups
        while len(times.transfer) < settings.repeats:
            spent = time.monotonic() - begin
            if spent > settings.row_seconds:
                warmups = min(warmups, number)  # a slow library: what was seen so far has to be warm enough
                if len(times.transfer) >= settings.least:
                    break
            self._step(work, number / (settings.warmups + settings.repeats))
            if settings.verify:
                self._channel.call("spoil")
            ceiling_seconds = ceiling.measure() if ceiling else 0.0
            start = time.perf_counter()
            planned = sender.transfer(number)
            elapsed = time.perf_counter() - start
            answer = self._channel.call("arrived", number=number, check=settings.verify)
            if answer["wrong"]:
                raise BenchError(f"repeat {number}: {answer['wrong']}")
            number += 1
            if number <= warmups:
                continue
            times.transfer.append(elapsed)
            times.plan.append(planned)
            times.ceiling.append(ceiling_seconds)
            if isinstance(ceiling, StreamCeiling) and len(times.one_stream) < 3:
                times.one_stream.append(ceiling.measure(streams=1))
        return times

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
    names = ("gbps", "p50_ms", "p99_ms", "plan_us", "ceiling_gbps", "ceiling_1stream_gbps", "percent_of_ceiling")
    nothing: Row = dict.fromkeys(names)
    return nothing | {"repeats": 0, "ceiling_kind": None, "verified": False, "failed": reason}


def _figures(times: _Times, bytes: int) -> Row:
    """Seconds to figures. GB/s are 1e9 bytes per second, from the medians."""
    p50, p99 = (float(np.percentile(times.transfer, q)) for q in (50, 99))
    ceiling = float(np.median(times.ceiling))
    one = bytes / min(times.one_stream) / 1e9 if times.one_stream else None
    return {
        "gbps": bytes / p50 / 1e9,
        "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3,
        "plan_us": float(np.median(times.plan)) * 1e6,
        "repeats": len(times.transfer),
        "ceiling_gbps": bytes / ceiling / 1e9 if ceiling else None,
        "ceiling_1stream_gbps": one,
        "percent_of_ceiling": 100 * ceiling / p50 if ceiling else None,
        "failed": None,
    }


def _version() -> str:
    import pdxfer

    return str(pdxfer.__version__)
