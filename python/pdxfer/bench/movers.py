"""What the bench asks of a library that moves pages: pdxfer itself, and the peers in bench/peers.

A library is two classes, one per end, found by name in `MOVERS`. The runner times `transfer` and nothing else.
Optional libraries are imported when their class is made, never before.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field
from typing import Any, Protocol

from pdxfer.bench.errors import BenchError
from pdxfer.bench.memory import Pool
from pdxfer.bench.workloads import Geometry, Pages


@dataclass(frozen=True)
class Options:
    """How a library is to be set up; travels to the other end as JSON."""

    transport: str  # shm | tcp | rdma | cuda_ipc | auto
    settings: dict[str, str] = field(default_factory=dict)  # pdxfer.Config fields
    host: str = "127.0.0.1"  # where this end can be reached by the other
    secret: str = ""
    memory: str = "host"  # host | device
    device: int = 0  # this end's GPU, as this process counts them
    remote_device: int = 1  # the other end's, as that process counts them
    isolate: bool = False  # each process sees its own GPU alone


@dataclass(frozen=True)
class Path:
    """What the library does with the bytes, as it says itself."""

    transport: str
    path: str
    reason: str = ""
    copy_threads: int = 1
    streams: int = 1


class Sender(Protocol):
    """The end that writes. Throws what the library throws; the runner turns it into a failed row."""

    def connect(self, pool: Pool, remote: dict[str, Any]) -> None:
        """Register the source pool and connect to the receiver, of which `remote` is what its `open` returned."""

    def path(self) -> Path:
        """How bytes travel now. Connected only."""

    def prepare(self, geometry: Geometry, src: Pages, dst: Pages) -> None:
        """Whatever can be done once for a pair of pools (not for a page list)."""

    def transfer(self, number: int) -> float:
        """Move the pages and return when the library says that they are there. Returns seconds spent planning.

        Everything that a server must do anew for every request is done in here.
        """

    def note(self) -> str:
        """What a reader of the row should know; empty mostly."""

    def versions(self) -> dict[str, str]: ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """The end that is written to. One that has to take part in a transfer is told the pages by `prepare(...)`, too."""

    def open(self, pool: Pool) -> dict[str, Any]:
        """Register the destination pool; returns what the sender needs, as JSON."""

    def arrived(self, number: int) -> None:
        """Raise when the library has a notice of arrival and it did not come."""

    def close(self) -> None: ...


def mapped(options: Options) -> bool:
    """May one GPU's memory be mapped into the other's process? `cuda=path=staging` says no, and to every library."""
    text = options.settings.get("cuda") or os.environ.get("PDXFER_CUDA", "")
    return "path=staging" not in [option.strip() for option in text.split(",")]


def rdma_device(options: Options) -> str:
    """The first device that pdxfer was told to use on this end (`rdma` setting), for libraries that must be told."""
    text = options.settings.get("rdma") or os.environ.get("PDXFER_RDMA", "")
    for option in text.split(","):
        name, _, value = option.partition("=")
        if name.strip() == "devices" and value:
            return value.split(";")[0].strip()
    raise BenchError('over RDMA other libraries must be told a device: PDXFER_RDMA="devices=mlx5_0" at each end')


# library -> (module, what to install)
MOVERS = {
    "pdxfer": ("pdxfer.bench.own", "pip install pdxfer"),
    "nixl": ("pdxfer.bench.peers.nixl", "pip install --no-deps nixl nixl-cu13"),
    "mooncake": ("pdxfer.bench.peers.mooncake", "pip install mooncake-transfer-engine-non-cuda"),
    "nccl": ("pdxfer.bench.peers.nccl", "pip install torch"),
    "memcpy-batch": ("pdxfer.bench.peers.memcpy_batch", "a CUDA driver of 13.0 or later"),
}
PEERS = ("nixl", "mooncake")
DEVICE_PEERS = ("nixl", "mooncake", "nccl", "memcpy-batch")  # libraries that move GPU memory


def make_sender(library: str, options: Options) -> Sender:
    sender: Sender = importlib.import_module(MOVERS[library][0]).make_sender(options)
    return sender


def make_receiver(library: str, options: Options) -> Receiver:
    receiver: Receiver = importlib.import_module(MOVERS[library][0]).make_receiver(options)
    return receiver
