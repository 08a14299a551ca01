"""pdxfer as the bench drives it: the public Python API, one engine per end, one region per buffer."""

from __future__ import annotations

import os
import time
from typing import Any

import pdxfer
from pdxfer.bench.cuda import DeviceBuffer
from pdxfer.bench.errors import BenchError
from pdxfer.bench.memory import Buffer, Pool, address_of
from pdxfer.bench.movers import Options, Path
from pdxfer.bench.workloads import Geometry, Pages

CONNECT_SECONDS = 20.0
TRANSFER_SECONDS = 120.0
NOTICE_SECONDS = 5.0
_TAG = 0x70640000


def make_sender(options: Options) -> OwnSender:
    return OwnSender(options)


def make_receiver(options: Options) -> OwnReceiver:
    return OwnReceiver(options)


def make_config(options: Options) -> pdxfer.Config:
    """The engine's settings: the environment's, then what the command line said."""
    fields: dict[str, str | int] = {"host": options.host, **options.settings}
    fields["transports"] = options.transport
    if options.secret:
        fields["secret"] = options.secret
    config = pdxfer.Config(environment=True, **fields)
    if config.items()["copy_threads"] == "0":  # said outright, so that the memcpy ceiling uses as many
        fields["copy_threads"] = min(max(1, (os.cpu_count() or 1) // 4), 4)
        config = pdxfer.Config(environment=True, **fields)
    return config


def registrable(buffer: Buffer) -> object:
    """What `Engine.register_memory` takes."""
    if isinstance(buffer, DeviceBuffer):
        return (buffer.pointer, buffer.nbytes, f"cuda:{buffer.cuda.ordinal}")
    return buffer


class OwnSender:
    def __init__(self, options: Options) -> None:
        config = make_config(options)
        self._settings = config.items()
        self._engine = pdxfer.Engine(config)
        self._peer: pdxfer.Peer | None = None
        self._regions: list[tuple[int, int]] = []
        self._remote: list[tuple[int, int]] = []
        self._pairing: pdxfer.Pairing | None = None
        self._pages: tuple[Pages, Pages] | None = None

    def connect(self, pool: Pool, remote: dict[str, Any]) -> None:
        self._regions = [(self._engine.register_memory(registrable(buffer)).id, 0) for buffer in pool]
        self._peer = self._engine.connect(remote["address"], timeout=CONNECT_SECONDS)
        self._remote = []
        for pointer, size in remote["buffers"]:
            region, offset = self._peer.find_region(pointer, size, timeout=CONNECT_SECONDS)
            self._remote.append((region.id, offset))

    def path(self) -> Path:
        assert self._peer is not None
        told = self._engine.explain(self._peer)
        passed = "; ".join(f"{name}: {why}" for name, why in told["passed_over"].items() if why)
        return Path(
            transport=str(told["transport"]),
            path=str(told["path"]),
            reason=f"not {passed}" if passed else "",
            copy_threads=int(self._settings["copy_threads"]),
            streams=int(self._settings["tcp_streams"]) or 4,  # left to the engine: the ceiling still has four
        )

    def prepare(self, geometry: Geometry, src: Pages, dst: Pages) -> None:
        def layout(buffers: list[tuple[int, int]], slots: int, token: int, tp: int) -> pdxfer.KvLayout:
            return pdxfer.KvLayout(
                buffers=buffers,
                page_bytes=geometry.page_size * token,
                slots=slots,
                page_size=geometry.page_size,
                groups=geometry.groups,
                total_heads=geometry.heads,
                tp_size=tp if geometry.heads else 1,
                tp_rank=tp - 1 if geometry.heads else 0,
                dtype="bfloat16",
            )

        self._pairing = pdxfer.pair_layouts(
            layout(self._regions, geometry.src_slots, geometry.src_token, geometry.src_tp),
            layout(self._remote, geometry.dst_slots, geometry.dst_token, geometry.dst_tp),
        )
        self._pages = (src, dst)

    def transfer(self, number: int) -> float:
        assert self._peer is not None and self._pairing is not None and self._pages is not None
        begin = time.perf_counter()
        plan = pdxfer.make_plan(self._pairing, *self._pages)
        planned = time.perf_counter() - begin
        self._engine.transfer(self._peer, plan, tag=_TAG + number, timeout=TRANSFER_SECONDS)
        return planned

    def note(self) -> str:
        return ""

    def versions(self) -> dict[str, str]:
        return {}

    def close(self) -> None:
        self._engine.close()


class OwnReceiver:
    def __init__(self, options: Options) -> None:
        self._engine = pdxfer.Engine(make_config(options))
        self._arrived: dict[int, int] = {}  # transfer -> time.monotonic_ns() of its notice, until it is asked for

    def open(self, pool: Pool) -> dict[str, Any]:
        for buffer in pool:
            self._engine.register_memory(registrable(buffer))
        return {
            "address": self._engine.address,
            "buffers": [(address_of(buffer), buffer.nbytes) for buffer in pool],
        }

    def arrived(self, number: int) -> None:
        deadline = time.monotonic() + NOTICE_SECONDS
        while number not in self._arrived:
            self._collect()
            if time.monotonic() > deadline:
                raise BenchError(f"no notice of arrival within {NOTICE_SECONDS:g} s of the sender's completion")
            time.sleep(0)
        del self._arrived[number]  # every row counts from 0

    def watch(self, first: int, count: int) -> list[int]:
        """time.monotonic_ns() of each arrival of transfers `first` and up, polled for without a pause.

        Raises:
            BenchError: one failed, or they did not all come.
        """
        deadline = time.monotonic() + TRANSFER_SECONDS
        missing = set(range(first, first + count)) - self._arrived.keys()
        while missing:
            missing -= self._collect()
            if time.monotonic() > deadline:
                raise BenchError(f"{count - len(missing)} of {count} arrivals within {TRANSFER_SECONDS:g} s")
        return [self._arrived[number] for number in range(first, first + count)]

    def _collect(self) -> set[int]:
        """Notes when each new arrival was reported; their numbers."""
        arrivals = self._engine.poll()
        now = time.monotonic_ns()
        for arrival in arrivals:
            if not arrival.ok:
                raise BenchError(f"the receiver was told of a failed transfer: {arrival.status}")
            self._arrived[arrival.tag - _TAG] = now
        return {arrival.tag - _TAG for arrival in arrivals}

    def close(self) -> None:
        self._engine.close()
