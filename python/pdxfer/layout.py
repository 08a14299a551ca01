"""KV-cache layouts and transfer plans: which bytes of one rank's cache go where in another's.

A `KvLayout` says where a rank keeps its pages, `pair_layouts` matches two of them once (layers by global id, heads by
tensor-parallel rank), and `make_plan` turns page numbers into a `TransferPlan` for `Engine.submit`. Nothing here loops
over pages: arrays go to native code as they are, which runs without the GIL.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, TypeAlias, overload

from pdxfer import _core
from pdxfer._core import Pairing, TransferPlan

if TYPE_CHECKING:  # importing NumPy costs more than all of pdxfer; whoever has arrays has paid already
    import numpy as np
    import numpy.typing as npt

__all__ = ["KvLayout", "Pairing", "TransferPlan", "make_plan", "pair_layouts", "plan_from_extents"]


class HasRegionId(Protocol):
    """A `Region` or a `RemoteRegion`: anything with an integer `id`."""

    @property
    def id(self) -> int: ...


PageArray: TypeAlias = "npt.NDArray[np.integer[Any]] | Sequence[int]"
"""One-dimensional page numbers. A C-contiguous int32 array is used without a copy, other integers are converted."""

Part: TypeAlias = "tuple[Pairing, PageArray, PageArray] | tuple[Pairing, PageArray, PageArray, bool]"
"""(pairing, src_pages, dst_pages[, allow_duplicates]): one component of a plan, the KV cache or a state list."""


def _integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not low <= number <= high:
        raise _core.InvalidError(f"{name} is {number}: give {low} to {high}")
    return number


_U32 = 2**32 - 1
_I64 = 2**63 - 1


def _region_id(name: str, region: HasRegionId | SupportsIndex) -> int:
    number: Any = getattr(region, "id", region)
    return _integer(name, number, 0, _U32)


@dataclass(frozen=True)
class KvLayout:
    """Where one rank keeps its KV pages, or the rows of one state list.

    Page p of buffer b occupies `page_bytes` bytes from `offset + p * page_bytes` of its region. Within a page tokens
    lie back to back, within a token the rank's heads in ascending global order.

    Args:
        buffers: (region, offset) for each buffer, `groups x layers` long: K of every layer, then V of every layer. A
            region is what `Engine.register_memory` or `Peer.regions` gave, or its integer id; offsets are in bytes
            from the region's first byte to page 0.
        page_bytes: bytes of a page in every buffer, or one number per buffer. 0 marks a buffer that this layer does
            not have (both sides must agree).
        slots: pages per buffer, padding pages included; page numbers are in [0, slots).
        page_size: tokens per page.
        groups: 2 for K and V, 1 for MLA or state.
        layers: global layer ids in buffer order, so that pipeline stages pair by id. None: 0, 1, 2, ...
        total_heads: KV heads of the whole model when heads are sharded over tensor-parallel ranks. 0 when pages are
            whole and equal on every rank (MLA, state).
        tp_size: attention tensor-parallel size of this side.
        tp_rank: this rank in [0, tp_size).
        dtype: name of the element type; only compared with the other side's.

    Raises:
        InvalidError: a field is out of range or contradicts another.
        TypeError: a field is of the wrong kind.
    """

    buffers: Sequence[tuple[HasRegionId | SupportsIndex, SupportsIndex]]
    page_bytes: int | Sequence[int]
    slots: int
    page_size: int = 1
    groups: int = 1
    layers: Sequence[int] | None = None
    total_heads: int = 0
    tp_size: int = 1
    tp_rank: int = 0
    dtype: str = ""
    native: _core.Layout = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        buffers = tuple(
            (_region_id(f"buffers[{i}] region", region), _integer(f"buffers[{i}] offset", offset, 0, _I64))
            for i, (region, offset) in enumerate(self.buffers)
        )
        if isinstance(self.page_bytes, SupportsIndex):
            page_bytes = [_integer("page_bytes", self.page_bytes, 0, _I64)]
        else:
            page_bytes = [_integer(f"page_bytes[{i}]", n, 0, _I64) for i, n in enumerate(self.page_bytes)]
        layers = None
        if self.layers is not None:
            layers = tuple(_integer(f"layers[{i}]", n, -_I64, _I64) for i, n in enumerate(self.layers))
            if not layers:
                raise _core.InvalidError("layers is empty: give one global id per layer, or None for 0, 1, 2, ...")
        native = _core.Layout(
            buffers=list(buffers),
            page_bytes=page_bytes,
            slots=_integer("slots", self.slots, 0, _I64),
            page_size=_integer("page_size", self.page_size, 0, _U32),
            groups=_integer("groups", self.groups, 0, _U32),
            layers=list(layers or ()),
            total_heads=_integer("total_heads", self.total_heads, 0, _U32),
            tp_size=_integer("tp_size", self.tp_size, 0, _U32),
            tp_rank=_integer("tp_rank", self.tp_rank, 0, _U32),
            dtype=self.dtype,
        )
        # Frozen for the caller; normalised here once, so that later changes to the caller's lists change nothing.
        object.__setattr__(self, "buffers", buffers)
        object.__setattr__(self, "page_bytes", page_bytes[0] if len(page_bytes) == 1 else tuple(page_bytes))
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "native", native)


def pair_layouts(src: KvLayout, dst: KvLayout) -> Pairing:
    """Match a source rank's layout with a destination rank's; keep the result for every transfer between the two.

    Layers pair by global id and only common ones move. Where the sides shard heads differently, each moves the heads
    that both hold, token by token. `Pairing.redundant` tells that another source rank writes the same bytes and this
    one can skip the transfer.

    Raises:
        InvalidError: the layouts do not match (dtype, page size, groups, heads, bytes per head, no common layer or
            head, overlapping destination buffers); the text gives both values and what to change.
    """
    return _core.pair_layouts(src.native, dst.native)


@overload
def make_plan(
    src: KvLayout, dst: KvLayout, src_pages: PageArray, dst_pages: PageArray, /, *, allow_duplicates: bool = False
) -> TransferPlan: ...
@overload
def make_plan(
    pairing: Pairing, src_pages: PageArray, dst_pages: PageArray, /, *, allow_duplicates: bool = False
) -> TransferPlan: ...
@overload
def make_plan(*, parts: Sequence[Part]) -> TransferPlan: ...
def make_plan(*args: Any, parts: Sequence[Part] | None = None, allow_duplicates: bool = False) -> TransferPlan:
    """Plan a transfer: page `src_pages[i]` of every source buffer goes to page `dst_pages[i]` of its partner.

    Call it as `make_plan(src_layout, dst_layout, src_pages, dst_pages)`, with a kept pairing as
    `make_plan(pairing, src_pages, dst_pages)`, or with several components that form one batch as
    `make_plan(parts=[(pairing, src_pages, dst_pages[, allow_duplicates]), ...])`.

    Args:
        src_pages, dst_pages: one-dimensional integer arrays of equal length (int32 is taken without a copy). Empty
            arrays give a plan that moves nothing.
        allow_duplicates: permit a destination page to be named twice; which source wins is then undefined, so only
            for rows whose content is equal.

    Raises:
        InvalidError: lengths differ, a page is negative or beyond its layout, or a destination page repeats; the text
            names the first offending index and its value.
        TypeError: an array is not of integers.
    """
    if parts is not None:
        if args or allow_duplicates:
            raise TypeError("make_plan takes parts=[...] or layouts and pages; the flags of a part go into its tuple")
        return _core.make_plan([(p[0], p[1], p[2], p[3] if len(p) > 3 else False) for p in parts])
    if len(args) == 3:
        pairing, src_pages, dst_pages = args
        if not isinstance(pairing, Pairing):
            raise TypeError(f"expected a Pairing (from pair_layouts), not {type(pairing).__name__}")
    elif len(args) == 4:
        src, dst, src_pages, dst_pages = args
        if not isinstance(src, KvLayout) or not isinstance(dst, KvLayout):
            raise TypeError(f"expected two KvLayout, not {type(src).__name__} and {type(dst).__name__}")
        pairing = pair_layouts(src, dst)
    else:
        raise TypeError(
            "make_plan takes (src_layout, dst_layout, src_pages, dst_pages), (pairing, src_pages, dst_pages) or parts="
        )
    return _core.make_plan(pairing, src_pages, dst_pages, allow_duplicates)


def plan_from_extents(
    src_ids: PageArray, src_offsets: PageArray, dst_ids: PageArray, dst_offsets: PageArray, lengths: PageArray
) -> TransferPlan:
    """Plan a transfer from an address list, for callers that have no layout.

    Extent i is `lengths[i]` bytes from byte `src_offsets[i]` of region `src_ids[i]` to byte `dst_offsets[i]` of the
    peer's region `dst_ids[i]`. Neighbours that continue on both sides are merged; overlapping destinations are not
    detected.

    Args:
        src_ids, src_offsets, dst_ids, dst_offsets, lengths: one-dimensional integer arrays of one length.

    Raises:
        InvalidError: lengths differ, an id is not a region id, or an offset and length exceed 64 bits.
        TypeError: an array is not of integers.
    """
    return _core.plan_from_extents(src_ids, src_offsets, dst_ids, dst_offsets, lengths)
