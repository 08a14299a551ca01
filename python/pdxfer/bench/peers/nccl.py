"""torch + NCCL: gather into one staging tensor, send/recv, scatter; what one writes without a transfer library.

The receiving end takes part in every transfer: a thread of its own waits for one byte on a socket, receives, scatters,
synchronises and answers with one byte, which is the notice of arrival. The page lists are on both GPUs before the
clock starts. NVLink multicast is left off.
"""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import numpy as np

from pdxfer.bench.cuda import DeviceBuffer
from pdxfer.bench.errors import BenchError
from pdxfer.bench.memory import Pool
from pdxfer.bench.movers import Options, Path, mapped
from pdxfer.bench.workloads import Geometry, Pages

SECONDS = 60.0
_RANKS = 2


def make_sender(options: Options) -> NcclSender:
    return NcclSender(options)


def make_receiver(options: Options) -> NcclReceiver:
    return NcclReceiver(options)


def _join(rank: int, host: str, port: int, options: Options) -> Any:
    """A process group of both ends."""
    import datetime

    import torch
    import torch.distributed as dist

    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    if not mapped(options):
        os.environ["NCCL_P2P_DISABLE"] = "1"
    torch.cuda.set_device(options.device)
    dist.init_process_group(
        "nccl",
        init_method=f"tcp://{host}:{port}",
        rank=rank,
        world_size=_RANKS,
        timeout=datetime.timedelta(seconds=SECONDS),
        device_id=torch.device("cuda", options.device),
    )
    return dist


class _Pieces:
    """The pool as tensors of (slot or token, bytes), and which of them move."""

    def __init__(self, pool: Pool, geometry: Geometry, pages: Pages, source: bool) -> None:
        import torch

        token = geometry.src_token if source else geometry.dst_token
        skip = geometry.src_skip if source else geometry.dst_skip
        device = pool[0].cuda.ordinal if isinstance(pool[0], DeviceBuffer) else None
        assert device is not None
        flat = [torch.as_tensor(buffer, device=f"cuda:{device}") for buffer in pool]
        self._tokens, self._skip, self._piece = geometry.page_size, skip, geometry.piece
        if geometry.whole:
            self._views = [buffer.view(-1, geometry.page_size * token) for buffer in flat]
            index = pages.astype(np.int64)
        else:
            self._views = [buffer.view(-1, token)[:, skip : skip + geometry.piece] for buffer in flat]
            index = (pages.astype(np.int64)[:, None] * geometry.page_size + np.arange(geometry.page_size)).ravel()
        self._index = torch.from_numpy(index).to(f"cuda:{device}")
        width = self._views[0].shape[1]
        self.staging = torch.empty(len(pool), len(index), width, dtype=torch.uint8, device=f"cuda:{device}")

    def gather(self) -> None:
        import torch

        for row, view in zip(self.staging, self._views, strict=True):
            torch.index_select(view, 0, self._index, out=row)

    def scatter(self) -> None:
        for row, view in zip(self.staging, self._views, strict=True):
            view.index_copy_(0, self._index, row)


class NcclSender:
    def __init__(self, options: Options) -> None:
        import torch

        if options.memory != "device":
            raise BenchError("torch + NCCL is a peer of device memory alone")
        self._torch: Any = torch
        self._options = options
        self._pool: Pool = []
        self._pieces: _Pieces | None = None
        self._dist: Any = None
        self._socket: socket.socket | None = None

    def connect(self, pool: Pool, remote: dict[str, Any]) -> None:
        self._pool = pool
        self._socket = socket.create_connection((remote["host"], remote["port"]), timeout=SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._dist = _join(0, remote["host"], remote["store"], self._options)

    def path(self) -> Path:
        return Path("cuda_ipc", "torch gather, NCCL send/recv, torch scatter")

    def prepare(self, geometry: Geometry, src: Pages, dst: Pages) -> None:
        self._pieces = None
        self._pieces = _Pieces(self._pool, geometry, src, source=True)
        self._torch.cuda.synchronize()

    def transfer(self, number: int) -> float:
        assert self._pieces is not None and self._socket is not None
        self._socket.sendall(b"g")
        self._pieces.gather()
        self._dist.send(self._pieces.staging, 1)
        if self._socket.recv(1) != b"d":
            raise BenchError("the receiving end's NCCL thread ended")
        return 0.0  # torch plans nothing: the index is on the GPU

    def note(self) -> str:
        return ""

    def versions(self) -> dict[str, str]:
        version = ".".join(str(part) for part in self._torch.cuda.nccl.version())
        return {"torch": str(self._torch.__version__), "nccl": version}

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()  # the receiving thread ends on it
        if self._dist is not None:
            self._dist.destroy_process_group()
            self._dist = None


class NcclReceiver:
    def __init__(self, options: Options) -> None:
        import torch.distributed as dist

        self._options = options
        self._pool: Pool = []
        self._pieces: _Pieces | None = None
        self._failed = ""
        self._done = 0
        self._listener = socket.create_server((options.host, 0))
        self._listener.settimeout(SECONDS)
        self._store = _free_port(options.host)
        self._dist = dist
        self._thread: threading.Thread | None = None

    def open(self, pool: Pool) -> dict[str, Any]:
        self._pool = pool
        self._thread = threading.Thread(target=self._serve, name="bench-nccl", daemon=True)
        self._thread.start()
        return {"host": self._options.host, "port": self._listener.getsockname()[1], "store": self._store}

    def prepare(self, geometry: Geometry, src: Pages, dst: Pages) -> None:
        self._pieces = None
        self._pieces = _Pieces(self._pool, geometry, dst, source=False)

    def _serve(self) -> None:
        """Take part in transfers until the sender closes its socket."""
        import torch

        try:
            sock, _ = self._listener.accept()
            with sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                group = _join(1, self._options.host, self._store, self._options)
                try:
                    while sock.recv(1) == b"g":
                        assert self._pieces is not None
                        group.recv(self._pieces.staging, 0)
                        self._pieces.scatter()
                        torch.cuda.synchronize()
                        self._done += 1
                        sock.sendall(b"d")
                finally:
                    group.destroy_process_group()
        except Exception as error:  # said by `arrived`; the sender sees the socket close
            self._failed = f"{type(error).__name__}: {error}"

    def arrived(self, number: int) -> None:
        if self._failed or self._done <= number:
            raise BenchError(f"NCCL at the receiving end: {self._failed or 'nothing arrived'}")

    def close(self) -> None:
        self._listener.close()
        if self._thread is not None:
            self._thread.join(SECONDS)


def _free_port(host: str) -> int:
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])
