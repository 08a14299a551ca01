"""Mooncake's transfer engine over TCP or RDMA, with runs of pages merged as SGLang merges them.

Requests go in synchronous batches of at most 1,024 entries: the TCP transport answers "queue full" to a few thousand
and does not recover in that process. The row says when a request was cut.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from typing import Any

import numpy as np

from pdxfer.bench.errors import BenchError
from pdxfer.bench.memory import Pool, address_of
from pdxfer.bench.movers import Options, Path, mapped, rdma_device
from pdxfer.bench.workloads import Geometry, Pages, joint_runs

BATCH = 1024  # entries per call


def _nvlink(options: Options) -> bool:
    return options.memory == "device" and options.transport not in ("tcp", "rdma") and mapped(options)


def _engine(options: Options) -> Any:
    os.environ.setdefault("GLOG_minloglevel", "2")
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    protocol, device = ("rdma", rdma_device(options)) if options.transport == "rdma" else ("tcp", "")
    if _nvlink(options):
        os.environ["MC_INTRANODE_NVLINK"] = "true"  # "rdma" then takes NVLink inside a machine
        protocol = "rdma"
    code = engine.initialize(options.host, "P2PHANDSHAKE", protocol, device)
    if code != 0:
        raise BenchError(f"Mooncake's engine did not start on {options.host}: code {code}")
    return engine


def _register(engine: Any, pool: Pool) -> list[int]:
    addresses = [address_of(buffer) for buffer in pool]
    code = engine.batch_register_memory(addresses, [buffer.nbytes for buffer in pool])
    if code != 0:
        raise BenchError(f"Mooncake did not register the pool: code {code}")
    return addresses


def make_sender(options: Options) -> MooncakeSender:
    return MooncakeSender(options)


def make_receiver(options: Options) -> MooncakeReceiver:
    return MooncakeReceiver(options)


class MooncakeSender:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._engine = _engine(options)
        self._target = ""
        self._local: list[int] = []
        self._remote: list[int] = []
        self._geometry: Geometry | None = None
        self._pages: tuple[Pages, Pages] | None = None
        self._cut = False

    def connect(self, pool: Pool, remote: dict[str, Any]) -> None:
        self._local = _register(self._engine, pool)
        self._target, self._remote = remote["address"], remote["buffers"]

    def path(self) -> Path:
        if _nvlink(self._options):
            return Path("cuda_ipc", "Mooncake intra-node NVLink")
        protocol = "rdma" if self._options.transport == "rdma" else "tcp"
        return Path(protocol, f"Mooncake {protocol}", streams=int(self._options.settings.get("tcp_streams", 0)) or 4)

    def prepare(self, geometry: Geometry, src: Pages, dst: Pages) -> None:
        self._geometry, self._pages = geometry, (src, dst)

    def transfer(self, number: int) -> float:
        begin = time.perf_counter()
        entries = self._entries()
        planned = time.perf_counter() - begin
        batch = len(entries[0]) if _nvlink(self._options) else BATCH
        self._cut = len(entries[0]) > batch
        for first in range(0, len(entries[0]), batch):
            sources, targets, sizes = (column[first : first + batch] for column in entries)
            code = self._engine.batch_transfer_sync_write(self._target, sources, targets, sizes)
            if code != 0:
                raise BenchError(f"Mooncake gave up at entry {first} of {len(entries[0])}: code {code}")
        return planned

    def _entries(self) -> tuple[list[int], list[int], list[int]]:
        assert self._geometry is not None and self._pages is not None
        geometry = self._geometry
        if geometry.whole:
            runs = joint_runs(*self._pages)
            src = runs.src * (geometry.page_size * geometry.src_token)
            dst = runs.dst * (geometry.page_size * geometry.dst_token)
            size = runs.pages * (geometry.page_size * geometry.piece)
        else:
            tokens = np.arange(geometry.page_size, dtype=np.int64)
            src, dst = (
                (pages.astype(np.int64)[:, None] * geometry.page_size + tokens).ravel() * token + skip
                for pages, token, skip in (
                    (self._pages[0], geometry.src_token, geometry.src_skip),
                    (self._pages[1], geometry.dst_token, geometry.dst_skip),
                )
            )
            size = np.full(len(src), geometry.piece)
        sources = (np.array(self._local, dtype=np.int64)[:, None] + src).ravel().tolist()
        targets = (np.array(self._remote, dtype=np.int64)[:, None] + dst).ravel().tolist()
        return sources, targets, np.tile(size, len(self._local)).tolist()

    def note(self) -> str:
        return f"in batches of {BATCH}" if self._cut else ""

    def versions(self) -> dict[str, str]:
        for name in (
            "mooncake-transfer-engine-non-cuda",
            "mooncake-transfer-engine",
            "mooncake-transfer-engine-cuda13",
        ):
            try:
                return {"mooncake": importlib.metadata.version(name)}
            except importlib.metadata.PackageNotFoundError:
                continue
        return {"mooncake": "unknown"}

    def close(self) -> None:
        if self._local:
            self._engine.batch_unregister_memory(self._local)
            self._local = []


class MooncakeReceiver:
    def __init__(self, options: Options) -> None:
        self._host = options.host
        self._engine = _engine(options)
        self._registered: list[int] = []

    def open(self, pool: Pool) -> dict[str, Any]:
        self._registered = _register(self._engine, pool)
        return {"address": f"{self._host}:{self._engine.get_rpc_port()}", "buffers": self._registered}

    def arrived(self, number: int) -> None:
        """The synchronous call returned at the sender; Mooncake has no notice of arrival here."""

    def close(self) -> None:
        if self._registered:
            self._engine.batch_unregister_memory(self._registered)
            self._registered = []
