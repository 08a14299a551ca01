"""Engine: register memory, connect to other engines, move pages.

One engine per process (or per rank). Its worker thread is native; nothing here runs per page or per region.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from pdxfer import _core
from pdxfer._core import Arrival, Batch, Peer, Region, TransferPlan
from pdxfer.config import Config
from pdxfer.memory import span_of


class Engine:
    """Moves paged memory between processes.

    Args:
        config: settings; by default those of the environment.

    Raises:
        InvalidError: a setting is wrong.
        UnavailableError: the port is in use, or no transport works on this machine.
    """

    def __init__(self, config: Config | None = None) -> None:
        self._native = _core.Engine((config or Config())._native)
        self._keep: dict[int, object] = {}

    @property
    def address(self) -> str:
        """``host:port`` that other engines connect to (``[::1]:port`` for IPv6)."""
        return self._native.address

    @property
    def name(self) -> str:
        """``host:pid``, as peers see it."""
        return self._native.name

    def register_memory(self, memory: object) -> Region:
        """Make memory reachable: a torch tensor, NumPy array, DLPack object, or (pointer, bytes, device).

        The object is kept alive until `deregister_memory` or `close`; raw pointers are the caller's to keep.

        Returns:
            The region: `id`, `pointer`, `bytes` and `device` (-1: host memory).

        Raises:
            InvalidError: empty, not contiguous, or overlapping a registered region.
            UnavailableError: no transport can take this kind of memory.
        """
        span = span_of(memory)
        region = self._native.register_memory(span.pointer, span.bytes, span.device)
        self._keep[region.id] = span.keep
        return region

    def deregister_memory(self, region: Region | int) -> None:
        """Take a region back. Returns when no peer, batch or transport touches it any more.

        Batches that use it fail with InvalidError. A peer that does not let go within `peer_timeout_ms` is dropped.

        Raises:
            InvalidError: not a region of this engine.
        """
        region_id = region if isinstance(region, int) else region.id
        self._native.deregister_memory(region_id)
        self._keep.pop(region_id, None)

    def find_region(self, pointer: int, bytes: int) -> tuple[Region, int]:
        """The registered region that holds `bytes` bytes at `pointer`, and the offset in it.

        Raises:
            InvalidError: there is none.
        """
        return self._native.find_region(pointer, bytes)

    def connect(self, address: str, timeout: float | None = None) -> Peer:
        """Connect to the engine at ``host:port``; a path is chosen by itself (see `explain`).

        Args:
            timeout: seconds; by default `connect_timeout_ms`.

        Raises:
            InvalidError: the address does not parse.
            TransferTimeout: no answer in time.
            UnavailableError: nobody listens there, another version, a wrong secret, or no transport in common.
        """
        return self._native.connect(address, self._seconds("connect_timeout_ms") if timeout is None else timeout)

    def disconnect(self, peer: Peer | int) -> None:
        """Close the link to a peer. Outstanding batches to it fail with PeerLostError."""
        self._native.disconnect(peer if isinstance(peer, int) else peer.id)

    def peers(self) -> list[Peer]:
        """Every peer, connected or accepted, and the most recent lost ones (`alive` is False)."""
        return self._native.peers()

    def submit(self, peer: Peer | int, plan: TransferPlan, *, tag: int | None = None, tail: bytes = b"") -> Batch:
        """Queue a plan and return at once.

        Args:
            tag: 64-bit number that the receiver's `poll` reports on arrival; None: the receiver is not told.
            tail: at most 64 KiB that arrive with the notice.

        Returns:
            The batch: `poll()` is True once it is over, `wait(timeout)` raises what went wrong.

        Raises:
            InvalidError: a page lies outside its region, at either end; nothing was moved.
            PeerLostError: the peer is gone.
            UnavailableError: `max_batches` are in flight.
        """
        return self._native.submit(peer, plan, tag, tail)

    def cancel(self, batch: Batch) -> None:
        """Give a batch up. `batch.wait` raises CancelledError once nothing more of it can land."""
        self._native.cancel(batch)

    def transfer(
        self,
        peer: Peer | int,
        plan: TransferPlan,
        *,
        tag: int | None = None,
        tail: bytes = b"",
        timeout: float = 30.0,
    ) -> None:
        """`submit` and wait until the bytes are visible at the peer. At `timeout` seconds the batch is cancelled.

        Raises:
            TransferTimeout, PeerLostError, InvalidError, UnavailableError: see `submit`.
        """
        batch = self.submit(peer, plan, tag=tag, tail=tail)
        try:
            batch.wait(timeout)
        except _core.TransferTimeout:
            self.cancel(batch)
            raise

    def poll(self, max_completions: int = 64) -> list[Arrival]:
        """Tagged batches that arrived here, oldest first. Never waits.

        A batch that the path knows to have failed half-way is reported with `ok` False: tcp does; over shared memory
        the sender writes alone, and only `Peer.alive` tells that it is gone.
        """
        return self._native.poll(max_completions)

    def explain(self, peer: Peer | int) -> dict[str, Any]:
        """Which path moves bytes to a peer, and why not a better one."""
        native = peer if isinstance(peer, Peer) else self._native.peer(peer)
        return {
            "peer": native.name,
            "address": native.address,
            "alive": native.alive,
            "lost_reason": native.lost_reason,
            "transport": native.transport,
            "path": native.link,
            "passed_over": dict(native.passed_over),
            "regions": len(native.regions),
        }

    def stats(self) -> dict[str, Any]:
        """Counters since the start: batches and bytes per peer, batches in flight, transports and their state."""
        return {
            "address": self.address,
            "in_flight": self._native.in_flight,
            "transports": dict(self._native.transports),
            "peers": {
                peer.id: {
                    "name": peer.name,
                    "transport": peer.transport,
                    "alive": peer.alive,
                    "batches_sent": peer.batches_sent,
                    "bytes_sent": peer.bytes_sent,
                    "batches_failed": peer.batches_failed,
                    "batches_arrived": peer.batches_arrived,
                }
                for peer in self._native.peers()
            },
        }

    def close(self) -> None:
        """Close every peer and stop the threads; outstanding batches fail. Idempotent; nothing in a forked child."""
        if self._native.in_own_process:
            self._native.close()
            self._keep.clear()

    def _seconds(self, field: str) -> float:
        return int(dict(self._native.config)[field]) / 1e3

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
