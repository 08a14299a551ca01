"""NIXL over UCX, driven with the fastest of its Python ways for host memory.

Two are tried during the warm-up, the quicker is kept: lists prepared once per pool and selected by index (what vLLM
and SGLang do), and one descriptor per run of pages made for each request (where pages form runs at all).
"""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from pdxfer.bench.errors import BenchError
from pdxfer.bench.memory import Pool, address_of
from pdxfer.bench.movers import Options, Path, mapped, rdma_device
from pdxfer.bench.workloads import Geometry, Pages, joint_runs

TRANSFER_SECONDS = 60.0
NOTICE_SECONDS = 10.0
# Without cuda_copy the wheel for CUDA 13 takes no host memory on a machine that has a GPU (NIXL_ERR_BACKEND); elsewhere
# UCX passes over it.
_SHM = "shm,cma,self,tcp,cuda_copy"
_UCX_TLS = {"shm": _SHM, "tcp": "tcp,self,cuda_copy", "auto": _SHM, "rdma": "rc"}


def _tls(options: Options) -> str:
    """UCX's transports; for GPU memory everything it has on one machine, tcp alone for tcp rows."""
    if options.memory == "host" or options.transport in ("tcp", "rdma"):
        return _UCX_TLS[options.transport]
    return ("cuda_ipc," if mapped(options) else "") + _SHM


def _agent(name: str, options: Options, *, progress_thread: bool) -> Any:
    os.environ["UCX_TLS"] = _tls(options)  # read when the agent makes its UCX context
    if options.transport == "rdma":
        os.environ["UCX_NET_DEVICES"] = f"{rdma_device(options)}:1"
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    try:
        from nixl._api import nixl_agent, nixl_agent_config
    except ImportError:  # the wheel of one CUDA version without the front package
        from nixl_cu13._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(enable_prog_thread=progress_thread, backends=["UCX"]))


def _kind(options: Options) -> str:
    return "VRAM" if options.memory == "device" else "DRAM"


def make_sender(options: Options) -> NixlSender:
    return NixlSender(options)


def make_receiver(options: Options) -> NixlReceiver:
    return NixlReceiver(options)


class NixlSender:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._kind = _kind(options)
        self._agent = _agent("bench-sender", options, progress_thread=False)  # it polls; a thread more is slower
        self._peer = ""
        self._local: list[int] = []
        self._remote: list[int] = []
        self._registered: Any = None
        self._lists: tuple[Any, Any] | None = None
        self._geometry: Geometry | None = None
        self._pages: tuple[Pages, Pages] | None = None
        self._ways: list[str] = []
        self._seconds: dict[str, float] = {}

    def connect(self, pool: Pool, remote: dict[str, Any]) -> None:
        self._local = [address_of(buffer) for buffer in pool]
        self._remote = remote["buffers"]
        self._registered = self._agent.register_memory(
            [(address_of(buffer), buffer.nbytes, self._options.device, "") for buffer in pool], self._kind
        )
        name = self._agent.add_remote_agent(base64.b64decode(remote["metadata"]))
        self._peer = name.decode() if isinstance(name, bytes) else name

    def path(self) -> Path:
        near = "shm" if self._options.memory == "host" else "cuda_ipc"
        transport = self._options.transport if self._options.transport in ("tcp", "rdma") else near
        return Path(transport, f"UCX {_tls(self._options)}", streams=_streams(self._options))

    def prepare(self, geometry: Geometry, src: Pages, dst: Pages) -> None:
        self._release()

        def entries(addresses: list[int], device: int, slots: int, token: int, skip: int) -> npt.NDArray[np.uint64]:
            if geometry.whole:
                page = geometry.page_size * token
                rows = [(address, page, device, page, slots) for address in addresses]
            else:
                count = slots * geometry.page_size
                rows = [(address + skip, geometry.piece, device, token, count) for address in addresses]
            return np.array(rows, dtype=np.uint64)

        local = entries(self._local, self._options.device, geometry.src_slots, geometry.src_token, geometry.src_skip)
        remote = entries(
            self._remote, self._options.remote_device, geometry.dst_slots, geometry.dst_token, geometry.dst_skip
        )
        prepare = self._agent.prep_xfer_dlist
        self._lists = (prepare("", local, self._kind), prepare(self._peer, remote, self._kind))
        self._geometry, self._pages, self._seconds = geometry, (src, dst), {}
        merges = geometry.whole and len(joint_runs(src, dst).pages) < 0.9 * len(src)
        # Twice the first way: the first transfer of all also makes UCX's connections.
        self._ways = ["prepared lists", "prepared lists"] + (["a descriptor per run"] if merges else [])

    def transfer(self, number: int) -> float:
        trial = number < len(self._ways)
        way = self._ways[number] if trial else min(self._seconds, key=lambda name: self._seconds[name])
        begin = time.perf_counter()
        handle = self._by_index() if way == "prepared lists" else self._by_run()
        planned = time.perf_counter() - begin
        try:
            state = self._agent.transfer(handle)
            while state != "DONE":
                if state == "ERR":
                    raise BenchError("NIXL reports the transfer as failed")
                if time.perf_counter() - begin > TRANSFER_SECONDS:
                    raise BenchError(f"NIXL did not complete the transfer in {TRANSFER_SECONDS:g} s")
                state = self._agent.check_xfer_state(handle)
            if trial:
                self._seconds[way] = time.perf_counter() - begin
        finally:
            self._agent.release_xfer_handle(handle)
        return planned

    def _by_index(self) -> Any:
        assert self._geometry is not None and self._pages is not None and self._lists is not None
        geometry = self._geometry
        select = []
        for pages, slots in zip(self._pages, (geometry.src_slots, geometry.dst_slots), strict=True):
            if not geometry.whole:
                tokens = np.arange(geometry.page_size, dtype=np.int32)
                pages = (pages[:, None] * geometry.page_size + tokens[None, :]).ravel()
                slots = slots * geometry.page_size
            first = (np.arange(geometry.buffers, dtype=np.int32) * np.int32(slots))[:, None]
            select.append((first + pages[None, :]).ravel())
        return self._agent.make_prepped_xfer("WRITE", self._lists[0], select[0], self._lists[1], select[1], b"done")

    def _by_run(self) -> Any:
        assert self._geometry is not None and self._pages is not None
        page = self._geometry.page_size * self._geometry.src_token
        runs = joint_runs(*self._pages)
        lists = []
        sides = ((self._local, self._options.device, runs.src), (self._remote, self._options.remote_device, runs.dst))
        for addresses, device, firsts in sides:
            table = np.zeros((len(addresses), len(firsts), 3), dtype=np.uint64)
            table[:, :, 0] = np.array(addresses, dtype=np.uint64)[:, None] + (firsts * page).astype(np.uint64)[None, :]
            table[:, :, 1] = (runs.pages * page).astype(np.uint64)[None, :]
            table[:, :, 2] = device
            lists.append(self._agent.get_xfer_descs(table.reshape(-1, 3), self._kind))
        return self._agent.initialize_xfer("WRITE", lists[0], lists[1], self._peer, b"done")

    def note(self) -> str:
        return min(self._seconds, key=lambda name: self._seconds[name]) if self._seconds else ""

    def versions(self) -> dict[str, str]:
        for name in ("nixl", "nixl-cu13"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return {"nixl": importlib.metadata.version(name)}
        return {"nixl": "unknown"}

    def _release(self) -> None:
        for handle in self._lists or ():
            self._agent.release_dlist_handle(handle)
        self._lists = None

    def close(self) -> None:
        self._release()
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
            self._registered = None


class NixlReceiver:
    def __init__(self, options: Options) -> None:
        self._options = options
        self._kind = _kind(options)
        self._agent = _agent("bench-receiver", options, progress_thread=True)
        self._registered: Any = None
        self._notices = 0

    def open(self, pool: Pool) -> dict[str, Any]:
        self._registered = self._agent.register_memory(
            [(address_of(buffer), buffer.nbytes, self._options.device, "") for buffer in pool], self._kind
        )
        return {
            "metadata": base64.b64encode(self._agent.get_agent_metadata()).decode(),
            "buffers": [address_of(buffer) for buffer in pool],
        }

    def arrived(self, number: int) -> None:
        deadline = time.monotonic() + NOTICE_SECONDS
        while not self._notices:
            self._notices += sum(len(notices) for notices in self._agent.get_new_notifs().values())
            if time.monotonic() > deadline:
                raise BenchError(f"NIXL gave no notice of arrival within {NOTICE_SECONDS:g} s")
        self._notices -= 1

    def close(self) -> None:
        if self._registered is not None:
            self._agent.deregister_memory(self._registered)
            self._registered = None


def _streams(options: Options) -> int:
    return int(options.settings.get("tcp_streams", 0)) or 4
