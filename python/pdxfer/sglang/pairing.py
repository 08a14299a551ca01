"""From SGLang's buffer tables to factorised plans.

Which buffer of the prefill rank goes to which buffer of the decode rank (pipeline stages, draft layers, layer ids,
elided entries) is SGLang's own arithmetic and changes with its releases, so it is not repeated here: SGLang's code is
run once per (decode session, component) on page 0 with a `Probe` in place of the session id, and what it would have
sent becomes the table. Pages are multiplied in by native code, per transfer, from whole int32 arrays.

Called on transfer worker threads. Results are kept by the manager for as long as the decode rank's registration lives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import pdxfer

IntArray = npt.NDArray[np.int64]
Find = Callable[[int, int], tuple[Any, int]]  # (pointer, bytes) -> (region, offset)
ONE_PAGE = np.zeros(1, dtype=np.int32)


class Probe(str):
    """A session id that collects what would be sent to it. Equal to the id it is made of, so look-ups still work."""

    __slots__ = ("_lock", "_rows")
    _rows: list[tuple[int, int, int]]
    _lock: threading.Lock

    def __new__(cls, session: str) -> Probe:
        self = super().__new__(cls, session)
        self._rows = []
        self._lock = threading.Lock()
        return self

    def collect(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """Add (source address, destination address, bytes) rows. Any thread: SGLang spreads layers over an executor."""
        rows = [(int(src), int(dst), int(length)) for src, dst, length in rows]
        with self._lock:
            self._rows.extend(rows)

    def rows(self) -> IntArray:
        """int64, shape (n, 3): source address, destination address, bytes; ordered by source address."""
        return np.array(sorted(self._rows), dtype=np.int64).reshape(-1, 3)


class Part(NamedTuple):
    """One component of a transfer: page `src_pages[i]` goes to page `dst_pages[i]` in every buffer pair."""

    pairing: Any
    src_pages: npt.NDArray[np.int32]
    dst_pages: npt.NDArray[np.int32]
    allow_duplicates: bool = False  # may a destination page be named twice?


@dataclass(frozen=True)
class Heads:
    """How KV heads are spread on both sides. Ranks are those within attention TP."""

    total: int
    page_size: int
    src_tp: int
    src_rank: int
    dst_tp: int
    dst_rank: int


def _places(find: Find, pointers: Sequence[int], page_bytes: Sequence[int]) -> list[tuple[Any, int]]:
    return [find(int(pointer), int(length)) for pointer, length in zip(pointers, page_bytes, strict=True)]


def _slots(places: list[tuple[Any, int]], page_bytes: Sequence[int]) -> int:
    """Pages that every buffer has room for: up to the next buffer in the same region, or the region's end."""
    room = []
    starts: dict[int, list[int]] = {}
    for region, offset in places:
        starts.setdefault(region.id, []).append(offset)
    for (region, offset), length in zip(places, page_bytes, strict=True):
        end = min((start for start in starts[region.id] if start > offset), default=region.bytes)
        room.append((end - offset) // int(length))
    return min(room)


def _layout(places: list[tuple[Any, int]], page_bytes: Sequence[int], heads: tuple[int, int, int, int] | None) -> Any:
    total, page_size, tp_size, tp_rank = heads or (0, 1, 1, 0)
    return pdxfer.KvLayout(
        buffers=places,
        page_bytes=[int(length) for length in page_bytes],
        slots=_slots(places, page_bytes),
        page_size=page_size,
        groups=1,
        layers=list(range(len(places))),  # already paired: by position
        total_heads=total,
        tp_size=tp_size,
        tp_rank=tp_rank,
        dtype="bytes",
    )


def whole_pages(local: Find, remote: Find, rows: IntArray) -> Any:
    """The pairing of buffers whose pages are equal on both sides.

    Args:
        local, remote: find the region of an address on this side and on the decode side.
        rows: int64, shape (n, 3), one row per buffer: address of page 0 here, address of page 0 there, bytes of a page.
    """
    lengths = rows[:, 2].tolist()
    src = _layout(_places(local, rows[:, 0].tolist(), lengths), lengths, None)
    dst = _layout(_places(remote, rows[:, 1].tolist(), lengths), lengths, None)
    return pdxfer.pair_layouts(src, dst)


def _owners(addresses: IntArray, pointers: Sequence[int], whose: str) -> IntArray:
    """Index of the buffer each address lies in: the last that begins at or below it."""
    order = np.argsort(np.asarray(pointers, dtype=np.int64), kind="stable")
    at = np.searchsorted(np.asarray(pointers, dtype=np.int64)[order], addresses, side="right") - 1
    if (at < 0).any():
        raise RuntimeError(f"an address that SGLang computed lies before every buffer of the {whose} side")
    return order[at]


def head_slices(
    local: Find,
    remote: Find,
    rows: IntArray,
    src: tuple[Sequence[int], Sequence[int]],
    dst: tuple[Sequence[int], Sequence[int]],
    heads: Heads,
) -> Any:
    """The pairing of buffers whose tokens hold other heads on each side.

    Args:
        local, remote: as in `whole_pages`.
        rows: int64, shape (buffers * page_size, 3): what SGLang would send for page 0, one row per buffer and token.
        src, dst: (pointers, page bytes) of all buffers of a side.
        heads: the model's KV heads and both ranks.

    Raises:
        RuntimeError: SGLang's head arithmetic and ours disagree; nothing may be sent.
    """
    tokens = heads.page_size
    if len(rows) == 0 or len(rows) % tokens != 0:
        raise RuntimeError(f"SGLang sends {len(rows)} slices for a page of {tokens} tokens; please report this")
    table = rows.reshape(-1, tokens, 3)
    from_buffer = _owners(table[:, 0, 0], src[0], "prefill")
    to_buffer = _owners(table[:, 0, 1], dst[0], "decode")
    sides = []
    for find, (pointers, page_bytes), picked, ranks in (
        (local, src, from_buffer, (heads.src_tp, heads.src_rank)),
        (remote, dst, to_buffer, (heads.dst_tp, heads.dst_rank)),
    ):
        lengths = [int(page_bytes[i]) for i in picked]
        places = _places(find, [int(pointers[i]) for i in picked], lengths)
        sides.append((places, _layout(places, lengths, (heads.total, tokens, *ranks))))
    pairing = pdxfer.pair_layouts(sides[0][1], sides[1][1])
    bases = np.column_stack([np.asarray(src[0])[from_buffer], np.asarray(dst[0])[to_buffer]])
    offsets = np.column_stack([[offset for _, offset in places] for places, _ in sides])
    within = table[:, 0, :] - np.column_stack([bases, np.zeros(len(bases), dtype=np.int64)])
    _check_slices(pairing, within, offsets, heads)
    return pairing


def _check_slices(pairing: Any, wanted: IntArray, offsets: IntArray, heads: Heads) -> None:
    """Compare a pairing with what SGLang itself would send for the first token of page 0.

    Args:
        wanted: int64, shape (buffers, 3): source and destination offset of the slice within the buffer, bytes.
        offsets: int64, shape (buffers, 2): where the buffers begin in their regions.
    """
    pairs = np.asarray(pairing.pairs(), dtype=np.int64).reshape(-1, 7)
    per_slot = 1 if pairing.slots_per_page > 1 else heads.page_size  # tokens in a slot
    have = np.column_stack([pairs[:, 2:4], pairs[:, 6] // per_slot])
    wanted = wanted + np.column_stack([offsets, np.zeros(len(offsets), dtype=np.int64)])
    if have.shape != wanted.shape or not np.array_equal(have, wanted):
        raise RuntimeError(
            f"for {heads} SGLang slices (source offset, destination offset, bytes) {wanted[:2].tolist()}, pdxfer "
            f"{have[:2].tolist()}: their head arithmetic differs; nothing is sent; please report this"
        )
