"""The NumPy oracle of plans: what destination memory must hold, worked out byte by byte from the layouts alone.

Written for being obviously right, not for speed: it loops over layers, pages, tokens and heads, shares no code with
csrc/plan, and knows nothing of slots, runs or strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Memory = npt.NDArray[np.uint8]


class LayoutLike(Protocol):
    buffers: Sequence[tuple[int, int]]
    page_bytes: int | Sequence[int]
    slots: int
    page_size: int
    groups: int
    layers: Sequence[int] | None
    total_heads: int
    tp_size: int
    tp_rank: int


def heads_of(total_heads: int, tp_size: int, tp_rank: int) -> list[int]:
    """Global KV heads that a rank holds, in memory order. More ranks than heads: neighbours hold the same head."""
    if tp_size >= total_heads:
        return [tp_rank * total_heads // tp_size]
    per_rank = total_heads // tp_size
    return list(range(tp_rank * per_rank, (tp_rank + 1) * per_rank))


def _layer_ids(layout: LayoutLike) -> list[int]:
    count = len(layout.buffers) // layout.groups
    return list(layout.layers) if layout.layers is not None else list(range(count))


def _page_bytes(layout: LayoutLike, buffer: int) -> int:
    return layout.page_bytes if isinstance(layout.page_bytes, int) else layout.page_bytes[buffer]


def _pieces(src: LayoutLike, dst: LayoutLike, src_buffer: int, dst_buffer: int) -> list[tuple[int, int, int]]:
    """(offset in the source page, offset in the destination page, bytes) of everything a page moves."""
    src_page, dst_page = _page_bytes(src, src_buffer), _page_bytes(dst, dst_buffer)
    if src.total_heads == 0:
        assert src_page == dst_page
        return [(0, 0, src_page)]
    src_heads = heads_of(src.total_heads, src.tp_size, src.tp_rank)
    dst_heads = heads_of(dst.total_heads, dst.tp_size, dst.tp_rank)
    head = src_page // src.page_size // len(src_heads)
    pieces = []
    for token in range(src.page_size):
        for h in src_heads:
            if h in dst_heads:
                src_at = (token * len(src_heads) + src_heads.index(h)) * head
                dst_at = (token * len(dst_heads) + dst_heads.index(h)) * head
                pieces.append((src_at, dst_at, head))
    return pieces


def expected(
    src: LayoutLike,
    dst: LayoutLike,
    src_pages: Sequence[int],
    dst_pages: Sequence[int],
    src_memory: Mapping[int, Memory],
    dst_memory: Mapping[int, Memory],
) -> dict[int, Memory]:
    """Every destination region after the transfer, whole: bytes that must not change are there unchanged."""
    after = {region: memory.copy() for region, memory in dst_memory.items()}
    src_ids, dst_ids = _layer_ids(src), _layer_ids(dst)
    for layer in src_ids:
        if layer not in dst_ids:
            continue
        for group in range(src.groups):
            src_buffer = group * len(src_ids) + src_ids.index(layer)
            dst_buffer = group * len(dst_ids) + dst_ids.index(layer)
            src_region, src_offset = src.buffers[src_buffer]
            dst_region, dst_offset = dst.buffers[dst_buffer]
            pieces = _pieces(src, dst, src_buffer, dst_buffer)
            for src_page, dst_page in zip(src_pages, dst_pages, strict=True):
                src_base = src_offset + int(src_page) * _page_bytes(src, src_buffer)
                dst_base = dst_offset + int(dst_page) * _page_bytes(dst, dst_buffer)
                for src_at, dst_at, size in pieces:
                    piece = src_memory[src_region][src_base + src_at : src_base + src_at + size]
                    after[dst_region][dst_base + dst_at : dst_base + dst_at + size] = piece
    return after


def runs(src_pages: Sequence[int], dst_pages: Sequence[int]) -> set[tuple[int, int, int]]:
    """Longest runs (src, dst, count) of the set of page moves, whatever order the arrays name them in."""
    moves = {int(d): int(s) for s, d in zip(src_pages, dst_pages, strict=True)}
    found = set()
    for d, s in moves.items():
        if moves.get(d - 1) == s - 1:
            continue
        count = 1
        while moves.get(d + count) == s + count:
            count += 1
        found.add((s, d, count))
    return found
