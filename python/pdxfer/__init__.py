"""pdxfer: KV-cache transfer for prefill/decode disaggregated LLM serving.

with pdxfer.Engine() as engine:
    region = engine.register_memory(kv_pool)
    peer = engine.connect("10.0.0.2:4711")
    plan = pdxfer.make_plan(source_layout, destination_layout, source_pages, destination_pages)
    engine.transfer(peer, plan)
"""

from pdxfer._core import Arrival, Batch, Peer, Region, TransferPlan, __version__
from pdxfer.config import Config
from pdxfer.engine import Engine
from pdxfer.errors import (
    CancelledError,
    CorruptionError,
    InternalError,
    InvalidError,
    PdxferError,
    PeerLostError,
    TransferTimeout,
    UnavailableError,
)
from pdxfer.layout import KvLayout, Pairing, make_plan, pair_layouts

__all__ = [
    "Arrival",
    "Batch",
    "CancelledError",
    "Config",
    "CorruptionError",
    "Engine",
    "InternalError",
    "InvalidError",
    "KvLayout",
    "Pairing",
    "PdxferError",
    "Peer",
    "PeerLostError",
    "Region",
    "TransferPlan",
    "TransferTimeout",
    "UnavailableError",
    "__version__",
    "make_plan",
    "pair_layouts",
]
