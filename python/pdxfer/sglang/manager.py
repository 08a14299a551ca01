"""The KV manager of one rank: SGLang's protocol, with every byte moved by a pdxfer.Engine.

Built by the scheduler process on its main thread, once per role. Bootstrap, metadata, chunking, aborts, ACKs and
heartbeats stay SGLang's (MooncakeKVManager); the methods that move bytes are replaced here. Transfers run on SGLang's
worker threads, one chunk at a time each, chunks of one room in order (`queues`); the watch thread reports dead peers.
Nothing raises out of a worker: whatever goes wrong ends one room, tells the decode side why, and the worker takes the
next chunk.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager, MooncakeKVReceiver
from sglang.srt.disaggregation.utils import DisaggregationMode

import pdxfer
from pdxfer.sglang import ib_device, wire
from pdxfer.sglang.control_sockets import ControlSockets, close_of_manager, close_of_receivers
from pdxfer.sglang.data_path import DataPath, TransferEnded, Work
from pdxfer.sglang.devices import PointerDevices
from pdxfer.sglang.links import PeerLinks, PrefillRanks, Watch
from pdxfer.sglang.memory import MemoryTable
from pdxfer.sglang.queues import RoomQueue, by_room
from pdxfer.sglang.surface import EngineSurface

logger = logging.getLogger(__name__)

DEFAULT_TRANSFER_S = 300.0  # bound of one transfer, when SGLang has no waiting timeout of its own


class _Chunks:
    """SGLang's queue as a worker sees it: every chunk that is taken is announced first."""

    def __init__(self, queue: Any, begin: Callable[[Any], None]) -> None:
        self._queue = queue
        self._begin = begin

    def get(self) -> Any:
        chunk = self._queue.get()
        self._begin(chunk)
        return chunk

    def put(self, chunk: Any) -> None:
        self._queue.put(chunk)


class _Registrations(dict[str, Any]):
    """Decode ranks by session id: a new one is connected to at once, an unknown one is a clear error."""

    def __init__(self, entries: dict[str, Any], connect: Callable[[str], None]) -> None:
        super().__init__(entries)
        self._connect = connect

    def __setitem__(self, session: str, info: Any) -> None:
        super().__setitem__(session, info)
        self._connect(session)

    def __missing__(self, session: str) -> Any:
        raise RuntimeError(f"decode engine {session} is not registered here; it registers with its next request")


class PdxKVManager(DataPath, MooncakeKVManager):  # type: ignore[misc]
    """See the module's text. Constructor and public methods are SGLang's."""

    kv_status_msg_carries_reason = True  # the decode side's error then says what happened here

    def __init__(
        self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool | None = False
    ) -> None:
        names, note = ib_device.select(getattr(args, "ib_device", None), int(getattr(args, "gpu_id", 0) or 0))
        if note:
            logger.warning("pdxfer: %s", note)
        self._ib_devices = names
        self._work = Work()
        self._torn_down = False
        self._transfer_s = _transfer_bound()
        self._on_gpu = str(getattr(server_args, "device", "cuda")).startswith("cuda")
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        prefill = disaggregation_mode == DisaggregationMode.PREFILL
        self._control_sockets = ControlSockets(
            functools.partial(close_of_manager, self)
            if prefill
            else functools.partial(close_of_receivers, MooncakeKVReceiver)
        )
        self._watch = Watch(self._look)
        self._watch.start()
        logger.info(
            "pdxfer %s: %s rank %d, engine %s, %d regions, %s",
            pdxfer.__version__,
            disaggregation_mode.value,
            args.engine_rank,
            self._pdx.address,
            len(self._memory),
            ", ".join(f"{n / 2**30:.2f} GiB on {device}" for device, n in sorted(self._memory.device_bytes().items())),
        )

    # ------------------------------------------------------------------ engine and memory

    def init_engine(self) -> None:
        """Start this rank's engine. Called by the base constructor, after its control socket is bound."""
        chosen = "PDXFER_HOST" in os.environ  # by the user; else the address that SGLang gives its own sockets
        gpu = int(getattr(self.kv_args, "gpu_id", 0) or 0) if self._on_gpu else None
        rdma, note = ib_device.rdma_options(pdxfer.Config().items()["rdma"], self._ib_devices, gpu)
        if note:
            logger.warning("pdxfer: %s", note)
        host = str(self.local_ip).strip("[]")
        self._pdx = pdxfer.Engine(pdxfer.Config(rdma=rdma) if chosen else pdxfer.Config(host=host, rdma=rdma))
        self._memory = MemoryTable(self._pdx, PointerDevices(self._on_gpu))
        endpoint = wire.endpoint_of(self.local_ip, self.rank_port)
        self._links = PeerLinks(self._pdx, lambda: endpoint)
        self._prefill_ranks = PrefillRanks(self._pdx, lambda endpoint: self._control_sockets.retire(endpoint))
        self.engine = EngineSurface(self._pdx.address, self._memory, self._send_lists, self._links.get)

    @property
    def decode_kv_args_table(self) -> dict[str, Any]:
        """Registrations of decode ranks by session id; the base class assigns it."""
        return self._registrations

    @decode_kv_args_table.setter
    def decode_kv_args_table(self, entries: dict[str, Any]) -> None:
        self._registrations = _Registrations(entries, lambda session: self._links.connect_soon(session))

    @property
    def transfer_queues(self) -> list[RoomQueue]:
        """One queue per worker; the base class assigns them before it starts the workers."""
        return self._room_queues

    @transfer_queues.setter
    def transfer_queues(self, queues: list[Any]) -> None:
        self._room_queues = by_room(queues)

    def teardown(self) -> None:
        """Stop threads, close sockets and the engine. Idempotent; pool memory stays."""
        if self._torn_down:
            return
        self._torn_down = True
        self._watch.stop()
        self._links.close()
        parent = getattr(super(), "teardown", None)  # SGLang 0.5.21 and newer
        if parent is not None:
            parent()
        self._pdx.close()

    # ------------------------------------------------------------------ workers

    def transfer_worker(self, queue: Any, executor: Any, staging_buffer: Any = None, worker_index: int = 0) -> None:
        """SGLang's worker, entered again after a chunk that failed: one bad room never ends the thread."""
        chunks = _Chunks(queue, self._work.begin)
        while True:
            try:
                super().transfer_worker(chunks, executor, staging_buffer, worker_index)
                return  # told to stop
            except Exception as error:
                try:
                    # SGLang wraps what happened in a RuntimeError of its own, raised while handling it.
                    self._chunk_failed(error.__context__ or error)
                except Exception:
                    logger.exception("pdxfer: could not conclude a failed chunk; the worker goes on")

    def _chunk_failed(self, error: BaseException) -> None:
        chunk = self._work.chunk
        if chunk is None:
            raise error
        room = chunk.room
        if isinstance(error, TransferEnded):
            if error.cause is None:
                logger.debug("pdxfer: room %s was aborted while its KV cache was moving", room)
            else:
                logger.error("pdxfer: room %s failed: %s", room, error)
            if isinstance(error.cause, (pdxfer.PeerLostError, pdxfer.UnavailableError, pdxfer.TransferTimeout)):
                self._refuse_session(error.session)
        else:
            logger.error("pdxfer: room %s failed", room, exc_info=error)
        text = str(error) if isinstance(error, TransferEnded) else f"{type(error).__name__}: {error}"
        self._conclude(room, f"Failed to send KV cache: {text}")
        self._finish_chunk(chunk)

    def _finish_chunk(self, chunk: Any) -> None:
        """What SGLang's worker does after a chunk, for one that ended in an exception."""
        if not self._work.settled:
            return  # the room stays counted, which withholds its ACK in every SGLang that has ACKs
        room = chunk.room
        outstanding = getattr(self, "_staging_outstanding", {})
        if getattr(chunk, "staging_counted", False) and room in outstanding:
            outstanding[room] -= 1
        if getattr(self, "enable_deferred_decode_kv_release", False):
            self._maybe_ack_drained_abort(room)
        if outstanding.get(room, 0) <= 0 and (room not in self.request_status or chunk.is_last_chunk):
            self.transfer_infos.pop(room, None)
            self.req_to_decode_prefix_len.pop(room, None)
            outstanding.pop(room, None)

    def _conclude(self, room: int, reason: str) -> None:
        """Mark a room failed and tell the decode ranks, each SGLang version in its own way."""
        if room not in self.request_status:
            return
        if hasattr(self, "conclude_failure"):  # SGLang 0.5.20 and newer
            self.conclude_failure(bootstrap_room=room, failure_reason=reason)
            return
        self.record_failure(room, reason)
        self.update_status(room, KVPoll.Failed)
        rank = self.attn_tp_rank * self.pp_size * self.attn_cp_size + self.pp_rank * self.attn_cp_size
        for info in list(self.transfer_infos.get(room, {}).values()):
            if not info.is_dummy:
                self.sync_status_to_decode_endpoint(
                    info.endpoint, info.dst_port, room, KVPoll.Failed, rank + self.attn_cp_rank
                )

    def _refuse_session(self, session: str) -> None:
        with self.session_lock:
            self.session_failures[session] += 1
            self.failed_sessions.add(session)

    def record_failure(self, bootstrap_room: int, failure_reason: str) -> None:
        """Keep why a room failed; on a thread that knows the cause, with the cause first."""
        cause = self._work.cause
        super().record_failure(bootstrap_room, f"{cause}: {failure_reason}" if cause else failure_reason)

    def update_status(self, bootstrap_room: int, status: Any) -> None:
        """SGLang's, but a failed room never becomes a success (before 0.5.20 it could)."""
        if status == KVPoll.Success and self.request_status.get(bootstrap_room) == KVPoll.Failed:
            return
        super().update_status(bootstrap_room, status)

    def poison_deferred_ack_room(self, room: int) -> None:
        """Withhold a room's ACK, unless this worker knows that nothing of the room can still be written."""
        if not self._work.settled:
            super().poison_deferred_ack_room(room)

    # ------------------------------------------------------------------ peers that die

    def note_prefill_ranks(self, bootstrap_addr: str, infos: list[dict[str, Any]]) -> None:
        """Decode side: the server at `bootstrap_addr` has these ranks. Called by receivers."""
        self._prefill_ranks.note(bootstrap_addr, [wire.endpoint_of(i["rank_ip"], i["rank_port"]) for i in infos])

    def _look(self) -> None:
        if self.disaggregation_mode == DisaggregationMode.PREFILL:
            for session, reason in self._links.take_lost().items():
                self._decode_lost(session, reason)
            self._control_sockets.close_due(self._decode_endpoints)
        else:
            for server, reason in self._prefill_ranks.take_lost().items():
                self._prefill_lost(server, reason)
            self._control_sockets.close_due(self._prefill_endpoints)

    def _decode_endpoints(self) -> set[str]:
        return {wire.endpoint_of(info.endpoint, info.dst_port) for info in list(self._registrations.values())}

    def _prefill_endpoints(self) -> set[str]:
        with self.connection_lock:
            known = [info for infos in self.connection_pool.values() for info in infos or ()]
        return {wire.endpoint_of(info.get("rank_ip"), info.get("rank_port")) for info in known}

    def _prefill_lost(self, server: str, reason: str) -> None:
        self._work.cause = f"PeerLostError: prefill server {server} is gone ({reason})"
        try:
            self._handle_node_failure(server)
        finally:
            self._work.cause = ""

    def _decode_lost(self, session: str, reason: str) -> None:
        logger.error("pdxfer: decode engine %s is gone: %s", session, reason)
        self._refuse_session(session)
        for room, infos in list(self.transfer_infos.items()):
            status = self.request_status.get(room)
            if session in infos and status is not None and status not in (KVPoll.Failed, KVPoll.Success):
                self._conclude(room, f"PeerLostError: decode engine {session} is gone: {reason}")
        info = self._registrations.pop(session, None)
        if info is not None:
            self._control_sockets.retire(wire.endpoint_of(info.endpoint, info.dst_port))

    def is_over(self, room: int) -> bool:
        """Has the room failed, or been cleared? Then nothing more is sent for it."""
        return self._torn_down or room not in self.request_status or self.check_status(room) == KVPoll.Failed


def _transfer_bound() -> float:
    from sglang.srt.environ import envs

    timeout = getattr(envs, "SGLANG_DISAGGREGATION_WAITING_TIMEOUT", None)
    return float(timeout.get()) if timeout is not None else DEFAULT_TRANSFER_S
