"""A stand-in for the parts of SGLang that the plugin builds on, for tests on machines without SGLang.

The classes have the names, signatures and, in small, the behaviour of SGLang's: a worker that takes chunks from a queue
and calls the sending methods, rooms with a status, abort ACKs that wait for the drain. `install` puts them into
sys.modules; the real thing is tested by tests/e2e.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
import threading
import types
from collections import defaultdict, deque
from typing import Any, ClassVar

import numpy as np


class KVPoll:
    Failed = 0
    Bootstrapping = 1
    WaitingForInput = 2
    Transferring = 3
    Success = 4


class DisaggregationMode(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class TransferBackend(enum.Enum):
    MOONCAKE = "mooncake"


class KVClassType(enum.Enum):
    KVARGS = "kvargs"
    MANAGER = "manager"
    SENDER = "sender"
    RECEIVER = "receiver"
    BOOTSTRAP_SERVER = "bootstrap_server"


class FastQueue:
    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._ready = threading.Condition()

    def put(self, item: Any) -> None:
        with self._ready:
            self._items.append(item)
            self._ready.notify()

    def get(self) -> Any:
        with self._ready:
            while not self._items:
                self._ready.wait()
            return self._items.popleft()


@dataclasses.dataclass
class Chunk:
    room: int
    prefill_kv_indices: Any
    index_slice: slice
    is_last_chunk: bool
    prefill_aux_index: int | None = None
    staging_counted: bool = False
    wait_event: Any = None
    indices_event: Any = None


@dataclasses.dataclass
class TransferInfo:
    room: int
    mooncake_session_id: str
    dst_kv_indices: Any
    dst_aux_index: int
    endpoint: str = "127.0.0.1"
    dst_port: int = 1
    required_dst_info_num: int = 1
    is_dummy: bool = False


@dataclasses.dataclass
class Registration:
    dst_kv_ptrs: list[int]
    dst_aux_ptrs: list[int]
    dst_tp_rank: int
    dst_attn_tp_size: int
    dst_kv_item_len: int
    endpoint: str = "127.0.0.1"
    dst_port: int = 40001


class MooncakeKVManager:
    """One rank: `args` describes its buffers; `statuses` is what a decode side would have been told."""

    def __init__(self, args: Any, disaggregation_mode: Any, server_args: Any, is_mla_backend: bool | None = False):
        self.kv_args = args
        self.disaggregation_mode = disaggregation_mode
        self.local_ip, self.rank_port = "127.0.0.1", args.rank_port
        self.attn_tp_size, self.attn_tp_rank = args.attn_tp_size, args.engine_rank
        self.is_mla_backend = is_mla_backend
        self.pp_size, self.pp_rank, self.attn_cp_size, self.attn_cp_rank = 1, 0, 1, 0
        self.request_status: dict[int, int] = {}
        self.failure_records: dict[int, str] = {}
        self.transfer_infos: dict[int, dict[str, TransferInfo]] = {}
        self.req_to_decode_prefix_len: dict[int, int] = {}
        self.decode_kv_args_table: dict[str, Registration] = {}
        self.enable_deferred_decode_kv_release = True
        self._staging_outstanding: dict[int, int] = defaultdict(int)
        self.poisoned: set[int] = set()
        self.ack_targets: set[int] = set()
        self.acked: list[int] = []
        self.statuses: list[tuple[int, int, str | None]] = []
        self.lost_servers: list[str] = []
        self.rows_by_socket: list[tuple[int, int, int, int]] = []  # room, rows on both sides, rooms concluded before
        self.torn_down = 0
        self.session_failures: dict[str, int] = defaultdict(int)
        self.failed_sessions: set[str] = set()
        self.session_lock = threading.Lock()
        self.connection_lock = threading.Lock()
        self.connection_pool: dict[str, list[dict[str, Any]]] = {}
        self._socket_lock = threading.Lock()
        self._socket_cache: dict[str, Any] = {}
        self._monitor_cache: dict[str, Any] = {}
        self._socket_send_locks: dict[str, threading.Lock] = {}
        self.init_engine()
        self.register_buffer_to_engine()
        self.transfer_queues = [FastQueue(), FastQueue()]
        self.workers: list[threading.Thread] = []
        if disaggregation_mode == DisaggregationMode.PREFILL:
            for queue in self.transfer_queues:
                worker = threading.Thread(target=self.transfer_worker, args=(queue, None), daemon=True)
                worker.start()
                self.workers.append(worker)

    def init_engine(self) -> None:
        raise NotImplementedError

    def register_buffer_to_engine(self) -> None:
        a = self.kv_args
        self.engine.batch_register(a.kv_data_ptrs, a.kv_data_lens)  # type: ignore[attr-defined]
        self.engine.batch_register(a.aux_data_ptrs, a.aux_data_lens)  # type: ignore[attr-defined]

    def deregister_buffer_to_engine(self) -> None:
        self.engine.batch_deregister(self.kv_args.kv_data_ptrs)  # type: ignore[attr-defined]
        self.engine.batch_deregister(self.kv_args.aux_data_ptrs)  # type: ignore[attr-defined]

    def teardown(self) -> None:
        self.torn_down += 1
        for queue in self.transfer_queues:
            queue.put(None)
        for worker in self.workers:
            worker.join(5)
        self.deregister_buffer_to_engine()

    def get_session_id(self) -> str:
        return str(self.engine.get_session_id())  # type: ignore[attr-defined]

    def check_status(self, room: int) -> int:
        return self.request_status[room]

    def update_status(self, bootstrap_room: int, status: int) -> None:
        if status == KVPoll.Failed:
            self.request_status[bootstrap_room] = status
        else:  # as before 0.5.20: a success may overtake a failure
            self.request_status[bootstrap_room] = max(self.request_status.get(bootstrap_room, 0), status)

    def record_failure(self, bootstrap_room: int, failure_reason: str) -> None:
        self.failure_records[bootstrap_room] = failure_reason

    def conclude_failure(self, *, bootstrap_room: int, failure_reason: str) -> None:
        self.record_failure(bootstrap_room, failure_reason)
        self.update_status(bootstrap_room, KVPoll.Failed)
        self.statuses.append((bootstrap_room, KVPoll.Failed, failure_reason))

    def _handle_node_failure(self, failed_bootstrap_addr: str) -> None:
        self.lost_servers.append(failed_bootstrap_addr)
        for room, status in list(self.request_status.items()):
            if status != KVPoll.Success:
                self.record_failure(room, f"Lost connection with prefill instance {failed_bootstrap_addr}")
                self.update_status(room, KVPoll.Failed)

    def poison_deferred_ack_room(self, room: int) -> None:
        self.poisoned.add(room)

    def _maybe_ack_drained_abort(self, room: int) -> None:
        if self._staging_outstanding.get(room, 0) == 0 and room in self.ack_targets and room not in self.poisoned:
            self.ack_targets.discard(room)
            self.acked.append(room)

    def _transfer_data(self, mooncake_session_id: str, transfer_blocks: Any) -> int:
        raise AssertionError("overridden")

    def _send_kvcache_generic(
        self,
        mooncake_session_id: str,
        src_data_ptrs: list[int],
        dst_data_ptrs: list[int],
        item_lens: list[int],
        prefill_data_indices: Any,
        dst_data_indices: Any,
        executor: Any,
        state_type: Any = None,
    ) -> int:
        rows = [
            (src + int(i) * length, dst + int(j) * length, length)
            for src, dst, length in zip(src_data_ptrs, dst_data_ptrs, item_lens, strict=True)
            for i, j in zip(prefill_data_indices, dst_data_indices, strict=True)
        ]
        return self._transfer_data(mooncake_session_id, rows)

    def send_kvcache_slice(
        self,
        mooncake_session_id: str,
        prefill_kv_indices: Any,
        dst_kv_ptrs: list[int],
        dst_kv_indices: Any,
        dst_tp_rank: int,
        dst_attn_tp_size: int,
        dst_kv_item_len: int,
        executor: Any,
    ) -> int:
        a = self.kv_args
        page, head = a.page_size, a.head_bytes
        src_heads, dst_heads = a.total_kv_head_num // self.attn_tp_size, a.total_kv_head_num // dst_attn_tp_size
        count = min(src_heads, dst_heads)
        src_start = (dst_tp_rank * dst_heads) % src_heads if self.attn_tp_size < dst_attn_tp_size else 0
        dst_start = (a.engine_rank * src_heads) % dst_heads if self.attn_tp_size > dst_attn_tp_size else 0
        for s, d in zip(a.kv_data_ptrs, dst_kv_ptrs, strict=True):
            rows = [
                (s + t * src_heads * head + src_start * head, d + t * dst_heads * head + dst_start * head, count * head)
                for t in range(page)
            ]
            assert list(prefill_kv_indices) == [0]
            self.engine.batch_transfer_sync(mooncake_session_id, *map(list, zip(*rows, strict=True)))  # type: ignore[attr-defined]
        return 0

    def send_aux(self, req: Any, prefill_aux_index: int, dst_aux_ptrs: list[int]) -> int:
        raise AssertionError("overridden")

    def send_aux_tcp(self, req: Any, prefill_aux_index: int, dst_aux_ptrs: list[int]) -> int:
        self.rows_by_socket.append((req.room, prefill_aux_index, req.dst_aux_index, len(self.statuses)))
        return 0

    def transfer_worker(self, queue: Any, executor: Any, staging_buffer: Any = None, worker_index: int = 0) -> None:
        while True:
            chunk = queue.get()
            if chunk is None:
                return
            try:
                self._work_on(chunk)
            except Exception as error:
                self.poison_deferred_ack_room(chunk.room)
                raise RuntimeError(f"Transfer thread failed because of {error}") from None

    def _work_on(self, chunk: Chunk) -> None:
        room = chunk.room
        self._staging_outstanding[room] += 1
        chunk.staging_counted = True
        for event in (chunk.wait_event, chunk.indices_event):
            if event is not None:
                event.synchronize()
        if room not in self.request_status or self.check_status(room) == KVPoll.Failed:
            self._staging_outstanding.pop(room)
            self._maybe_ack_drained_abort(room)
            return
        for req in list(self.transfer_infos[room].values()):
            info = self.decode_kv_args_table[req.mooncake_session_id]
            pages = req.dst_kv_indices[chunk.index_slice]
            if len(chunk.prefill_kv_indices):
                if info.dst_attn_tp_size == self.attn_tp_size:
                    a = self.kv_args
                    self._send_kvcache_generic(
                        mooncake_session_id=req.mooncake_session_id,
                        src_data_ptrs=a.kv_data_ptrs,
                        dst_data_ptrs=info.dst_kv_ptrs,
                        item_lens=a.kv_item_lens,
                        prefill_data_indices=chunk.prefill_kv_indices,
                        dst_data_indices=pages,
                        executor=None,
                    )
                else:
                    self.send_kvcache_slice(
                        req.mooncake_session_id,
                        chunk.prefill_kv_indices,
                        info.dst_kv_ptrs,
                        pages,
                        info.dst_tp_rank,
                        info.dst_attn_tp_size,
                        info.dst_kv_item_len,
                        None,
                    )
            if chunk.is_last_chunk:
                assert chunk.prefill_aux_index is not None
                self.send_aux(req, chunk.prefill_aux_index, info.dst_aux_ptrs)
        if chunk.is_last_chunk:
            self.update_status(room, KVPoll.Success)
            self.statuses.append((room, self.request_status[room], None))
        self._staging_outstanding[room] -= 1
        self._maybe_ack_drained_abort(room)


class MooncakeKVSender:
    pass


class MooncakeKVReceiver:
    _global_lock = threading.Lock()
    _socket_cache: ClassVar[dict[str, Any]] = {}

    @classmethod
    def disconnect_endpoint(cls, endpoint: str) -> None:
        with cls._global_lock:
            cls._socket_cache.pop(endpoint).close()

    def init(self, prefill_dp_rank: int) -> None:
        pass


class MooncakeKVBootstrapServer:
    pass


class HookType(enum.Enum):
    AROUND = "around"


class HookRegistry:
    hooks: dict[str, Any] = {}

    @classmethod
    def register(cls, target: str, hook: Any, hook_type: Any) -> None:
        cls.hooks[target] = hook


def get_kv_class(transfer_backend: Any, class_type: Any) -> Any:
    return f"sglang's {transfer_backend.value} {class_type.name}"


def install(monkeypatch: Any, *, app_path: bool = True, adder_is_extend: bool = True) -> types.SimpleNamespace:
    """Put the stand-in into sys.modules until the test ends, and drop modules of the plugin that saw another one."""
    modules: dict[str, types.ModuleType] = {}

    def module(name: str, **names: Any) -> types.ModuleType:
        modules[name] = made = types.ModuleType(name)
        made.__dict__.update(names)
        return made

    base = "sglang.srt.disaggregation"
    for package in ("sglang", "sglang.srt", base, f"{base}.base", "sglang.srt.plugins"):
        module(package).__path__ = []
    module(f"{base}.base.conn", KVPoll=KVPoll)
    conn = module(
        f"{base}.mooncake.conn",
        MooncakeKVManager=MooncakeKVManager,
        MooncakeKVSender=MooncakeKVSender,
        MooncakeKVReceiver=MooncakeKVReceiver,
        MooncakeKVBootstrapServer=MooncakeKVBootstrapServer,
    )
    module(f"{base}.mooncake", conn=conn).__path__ = []
    backend = enum.Enum("TransferBackend", {"MOONCAKE": "mooncake"})  # type: ignore[misc]
    utils = module(
        f"{base}.utils",
        DisaggregationMode=DisaggregationMode,
        TransferBackend=backend,
        KVClassType=KVClassType,
        get_kv_class=get_kv_class,
    )
    modules[base].utils = utils  # type: ignore[attr-defined]
    choices: list[str] = ["mooncake"]

    def add(more: list[str]) -> None:
        choices.extend(more)

    server_args = module(
        "sglang.srt.server_args",
        DISAGG_TRANSFER_BACKEND_CHOICES=choices,
        add_disagg_transfer_backend_choices=choices.extend if adder_is_extend else add,
    )
    modules["sglang.srt"].server_args = server_args  # type: ignore[attr-defined]
    envs = types.SimpleNamespace(SGLANG_HTTP_SERVER_APP_PATH=None) if app_path else types.SimpleNamespace()
    module("sglang.srt.environ", envs=envs)
    HookRegistry.hooks = {}
    module("sglang.srt.plugins.hook_registry", HookRegistry=HookRegistry, HookType=HookType)
    module("torch", cuda=types.SimpleNamespace(is_available=lambda: False))
    for name, made in modules.items():
        monkeypatch.setitem(sys.modules, name, made)
    for name in [n for n in sys.modules if n.startswith("pdxfer.sglang.")]:
        monkeypatch.delitem(sys.modules, name)
    return types.SimpleNamespace(
        conn=conn, utils=utils, choices=choices, backend=backend, hooks=HookRegistry.hooks, server_args=server_args
    )


class Rank:
    """One rank's memory, and the arguments that describe it to a manager."""

    def __init__(
        self, *, layers: int = 2, heads: int = 4, tp: int = 1, rank: int = 0, page_size: int = 4, pages: int = 32
    ) -> None:
        self.head_bytes = 16
        self.item = page_size * (heads // tp) * self.head_bytes
        self.kv = [np.zeros((pages, self.item), np.uint8) for _ in range(2 * layers)]
        self.aux = [np.zeros((8, 64), np.uint8), np.zeros((8, 128), np.uint8)]
        self.args = types.SimpleNamespace(
            engine_rank=rank,
            attn_tp_size=tp,
            rank_port=30000 + rank,
            gpu_id=0,
            ib_device=None,
            page_size=page_size,
            head_bytes=self.head_bytes,
            total_kv_head_num=heads,
            kv_data_ptrs=[a.ctypes.data for a in self.kv],
            kv_data_lens=[a.nbytes for a in self.kv],
            kv_item_lens=[self.item] * len(self.kv),
            aux_data_ptrs=[a.ctypes.data for a in self.aux],
            aux_data_lens=[a.nbytes for a in self.aux],
            aux_item_lens=[64, 128],
        )

    def registration(self) -> Registration:
        a = self.args
        return Registration(a.kv_data_ptrs, a.aux_data_ptrs, a.engine_rank, a.attn_tp_size, self.item)
