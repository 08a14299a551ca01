"""Every component that SGLang's manager sends, by SGLang's own code and by ours, byte for byte.

SGLang's Mooncake manager over an engine that is memmove is the oracle; ours is the same installed SGLang with the
plugin in front and two real engines. Each case fills the source with random bytes, sends to two equal destinations,
and compares all of both, so a byte too many shows as well. Needs no server, model or GPU; run by test_components.py.
"""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
from sglang.srt.disaggregation.base.conn import KVPoll, StateType
from sglang.srt.disaggregation.mooncake import conn

import pdxfer
from pdxfer.sglang import manager as ours
from pdxfer.sglang.data_path import Work
from pdxfer.sglang.links import PeerLinks
from pdxfer.sglang.memory import MemoryTable
from pdxfer.sglang.surface import EngineSurface

ROOM, PAGES, PAGE = 5, 24, 4
EXECUTOR = ThreadPoolExecutor(2)


class Memmove:
    """SGLang's engine surface inside one process."""

    def batch_transfer_sync(self, session: str, src: list[int], dst: list[int], lengths: list[int]) -> int:
        for a, b, n in zip(src, dst, lengths, strict=True):
            ctypes.memmove(b, a, n)
        return 0


class Side:
    """One rank's buffers and the arguments that describe them. A buffer is (rows, bytes of a row)."""

    def __init__(
        self, kv: list[int], states: list[tuple[str, list[int]]] = (), tp: int = 1, rank: int = 0, **more: Any
    ) -> None:
        self.kv = [np.zeros((PAGES, n), np.uint8) for n in kv]
        self.states = [[np.zeros((PAGES, n), np.uint8) for n in items] for _, items in states]
        self.aux = [np.zeros((8, n), np.uint8) for n in (64, 128, 64)]
        self.tp, self.rank = tp, rank
        state_layers = more.pop("state_layer_ids", [[] for _ in states])
        self.args = SimpleNamespace(
            engine_rank=rank,
            page_size=PAGE,
            kv_data_ptrs=[a.ctypes.data for a in self.kv],
            kv_item_lens=list(kv),
            kv_layer_ids=more.pop("kv_layer_ids", []),
            aux_data_ptrs=[a.ctypes.data for a in self.aux],
            aux_item_lens=[64, 128, 64],
            state_types=[StateType(name) for name, _ in states],
            state_data_ptrs=[[a.ctypes.data for a in s] for s in self.states],
            state_item_lens=[list(items) for _, items in states],
            state_layer_ids=state_layers,
            state_dim_per_tensor=more.pop("dims", [[] for _ in states]),
            prefill_start_layer=more.pop("start_layer", 0),
            prefill_end_layer=more.pop("end_layer", None),
            mla_compression_ratios=None,
            num_draft_entries=0,
            swa_kv_cache_layout="nhd",
            total_kv_head_num=more.pop("heads", 0),
            kv_head_num=1,
        )
        assert not more, more

    def arrays(self) -> list[Any]:
        return [*self.kv, *self.aux, *(a for s in self.states for a in s)]

    def info(self) -> Any:
        a = self.args
        return conn.KVArgsRegisterInfo(
            room="None",
            endpoint="127.0.0.1",
            dst_port=1,
            mooncake_session_id="",
            dst_kv_ptrs=a.kv_data_ptrs,
            dst_aux_ptrs=a.aux_data_ptrs,
            dst_state_data_ptrs=a.state_data_ptrs,
            dst_tp_rank=self.rank,
            dst_attn_tp_size=self.tp,
            dst_kv_item_len=a.kv_item_lens[0],
            dst_state_item_lens=a.state_item_lens,
            dst_state_dim_per_tensor=a.state_dim_per_tensor,
            dst_kv_layer_ids=a.kv_layer_ids,
            dst_state_layer_ids=a.state_layer_ids,
        )


def bare(cls: type[Any], src: Side, mla: bool, pp: int) -> Any:
    """A manager without sockets, threads or a scheduler around it."""
    m = object.__new__(cls)
    m.kv_args = src.args
    m.attn_tp_size = m.state_tp_size = src.tp
    m.attn_tp_rank = src.rank
    m.pp_size, m.pp_rank, m.attn_cp_size, m.attn_cp_rank = pp, 0, 1, 0
    m.is_mla_backend, m.is_hybrid_mla_backend = mla, False
    m.enable_custom_mem_pool, m.custom_mem_pool_type = False, None
    m.max_transfer_batch_indices = 0
    m.state_strides_validated = set()
    m.enable_deferred_decode_kv_release = True
    m.request_status = {ROOM: KVPoll.WaitingForInput}
    m.kv_shard_size, m.kv_shard_rank = 1, 0
    return m


def send(m: Any, session: str, info: Any, dst: Side, pages: tuple[Any, Any], states: tuple[Any, Any]) -> None:
    """What the worker does for a request's last chunk."""
    req = conn.TransferInfo(
        room=ROOM,
        endpoint="127.0.0.1",
        dst_port=1,
        mooncake_session_id=session,
        dst_kv_indices=pages[1],
        dst_aux_index=6,
        dst_state_indices=states[1],
        required_dst_info_num=1,
        is_dummy=False,
    )
    if len(pages[0]):
        if m.is_mla_backend or m.attn_tp_size == dst.tp:
            code = m.send_kvcache(
                session, pages[0], info.dst_kv_ptrs, pages[1], EXECUTOR, dst_layer_ids=info.dst_kv_layer_ids
            )
        else:
            code = m.send_kvcache_slice(
                session, pages[0], info.dst_kv_ptrs, pages[1], dst.rank, dst.tp, info.dst_kv_item_len, EXECUTOR
            )
        assert code == 0, code
    if states[0]:
        assert m.maybe_send_extra(req, states[0], EXECUTOR, info) == 0
    assert m.send_aux(req, 2, info.dst_aux_ptrs) == 0


def check(
    name: str,
    src: Side,
    make_dst: Any,
    states: tuple[Any, Any] = ((), ()),
    mla: bool = False,
    pp: int = 1,
) -> None:
    source = np.random.default_rng(3)
    for array in src.arrays():
        array[:] = source.integers(1, 255, array.shape, np.uint8)
    pages = np.array([3, 4, 5, 9, 1], np.int32), np.array([7, 8, 20, 21, 2], np.int32)
    oracle_dst, our_dst = make_dst(), make_dst()

    oracle = bare(conn.MooncakeKVManager, src, mla, pp)
    oracle.engine = Memmove()
    send(oracle, "10.0.0.1:1", oracle_dst.info(), oracle_dst, pages, states)

    with pdxfer.Engine() as here, pdxfer.Engine() as there:
        m = bare(ours.PdxKVManager, src, mla, pp)
        m._pdx, m._work, m._transfer_s, m._torn_down, m._on_gpu = here, Work(), 30.0, False, False
        m._memory = MemoryTable(here, lambda pointer: "cpu")
        m._memory.add([a.ctypes.data for a in src.arrays()], [a.nbytes for a in src.arrays()])
        remote = MemoryTable(there, lambda pointer: "cpu")
        remote.add([a.ctypes.data for a in our_dst.arrays()], [a.nbytes for a in our_dst.arrays()])
        m._links = PeerLinks(here, lambda: "127.0.0.1:1")
        m.engine = EngineSurface(here.address, m._memory, m._send_lists, m._links.get)
        info = our_dst.info()
        m.decode_kv_args_table = {}
        dict.__setitem__(m.decode_kv_args_table, there.address, info)
        m._work.begin(SimpleNamespace(room=ROOM, is_last_chunk=True))
        send(m, there.address, info, our_dst, pages, states)
        send(m, there.address, info, our_dst, pages, states)  # again, from kept pairings
        m._links.close()

    moved = 0
    for want, have in zip(oracle_dst.arrays(), our_dst.arrays(), strict=True):
        assert np.array_equal(want, have), f"{name}: {int((want != have).sum())} of {want.size} bytes differ"
        moved += int((want != 0).sum())
    assert moved > 500, f"{name}: the oracle moved next to nothing"
    print(f"ok {name}: {moved} bytes")


def state_case(name: str, items: list[int], src_rows: list[int], dst_rows: list[int]) -> None:
    if name in {member.value for member in StateType}:
        make = lambda: Side([256] * 4, [(name, items)])  # noqa: E731
        check(f"state {name}", make(), make, ([src_rows], [dst_rows]))


def check_states() -> None:
    rows = [3, 4, 9], [1, 2, 17]
    for name in ("swa", "dsa", "swa_ring", "request_row", "block_scale", "block_scale_swa"):
        state_case(name, [128] * 4, *rows)
    state_case("mamba", [640, 96, 640, 96], [3], [11])
    if hasattr(conn.MooncakeKVManager, "_send_swa_state_slice"):
        for src_tp, dst_tp in ((1, 2), (2, 1)):
            side = lambda tp, rank: Side(  # noqa: E731
                [PAGE * (4 // tp) * 32] * 4, [("swa", [PAGE * (4 // tp) * 16] * 4)], tp=tp, rank=rank, heads=4
            )
            check(
                f"state swa, TP {src_tp} -> TP {dst_tp}",
                side(src_tp, src_tp - 1),
                lambda: side(dst_tp, dst_tp - 1),  # noqa: B023
                ([rows[0]], [rows[1]]),
            )
    for src_tp, dst_tp in ((1, 2), (2, 1)):
        side = lambda tp, rank: Side(  # noqa: E731
            [PAGE * (4 // tp) * 32] * 4,
            [("mamba", [8 // tp * 24, 8 // tp * 40])],
            tp=tp,
            rank=rank,
            heads=4,
            dims=[[8 // tp, 8 // tp]],
        )
        check(
            f"state mamba, TP {src_tp} -> TP {dst_tp}",
            side(src_tp, src_tp - 1),
            lambda: side(dst_tp, dst_tp - 1),  # noqa: B023
            ([[3]], [[11]]),
        )


def main() -> None:
    # Outside a scheduler these answer for a server with default options.
    for name, fields in (
        ("get_memory", {"enable_unified_memory": False}),
        ("get_parallel", {"enable_kv_cache_sharding": False, "enable_dsa_cache_layer_split": False}),
        ("get_spec", {"speculative_algorithm": None}),
    ):
        if hasattr(conn, name):
            setattr(conn, name, lambda fields=fields: SimpleNamespace(**fields))

    plain = lambda: Side([256] * 6)  # noqa: E731
    check("KV, equal TP", plain(), plain)
    check("KV, MLA", Side([288] * 5), lambda: Side([288] * 5), mla=True)
    check("KV, pipeline stage", Side([256] * 4, start_layer=1, end_layer=3), lambda: Side([256] * 8), pp=2)
    check(
        "KV, MLA pipeline stage", Side([288] * 2, start_layer=3, end_layer=5), lambda: Side([288] * 6), mla=True, pp=2
    )
    for src_tp, dst_tp, heads in ((1, 2, 4), (2, 1, 4), (4, 2, 8), (2, 4, 4)):
        item = lambda tp, heads=heads: PAGE * max(1, heads // tp) * 32  # noqa: E731
        for rank in range(src_tp):
            dst_rank = rank * dst_tp // src_tp
            src = Side([item(src_tp)] * 4, tp=src_tp, rank=rank, heads=heads)
            check(
                f"KV heads, TP {src_tp} rank {rank} -> TP {dst_tp} rank {dst_rank}",
                src,
                lambda: Side([item(dst_tp)] * 4, tp=dst_tp, rank=dst_rank, heads=heads),  # noqa: B023
            )
    check(
        "KV, layer ids",
        Side([256] * 4, kv_layer_ids=[1, 3, 1, 3]),
        lambda: Side([256] * 4, kv_layer_ids=[1, 3, 1, 3]),
        mla=True,
    )
    check_states()
    print("all components agree")


if __name__ == "__main__":
    sys.exit(main())
