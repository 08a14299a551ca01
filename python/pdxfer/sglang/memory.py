"""Registered memory as SGLang hands it over: lists of pointers and lengths, some twice, some empty, some nested.

Owned by a manager, called from its scheduler thread. The engine wants disjoint regions; this table merges what
overlaps, counts who asked for what, and gives regions back when the last asker is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass
class _Span:
    """One region of the engine and the pieces that SGLang registered inside it."""

    begin: int
    end: int
    device: str
    region: Any
    pieces: dict[int, int] = field(default_factory=dict)  # pointer -> times registered

    def holds(self, pointer: int, length: int) -> bool:
        return self.begin <= pointer and pointer + length <= self.end


def merge_overlapping(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint (begin, end) that cover (pointer, length) pieces; neighbours that only touch stay apart."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((pointer, pointer + length) for pointer, length in pieces if length > 0):
        if merged and begin < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


class MemoryTable:
    """Registers with a `pdxfer.Engine` what SGLang registers with its manager's engine.

    Args:
        engine: the pdxfer engine.
        device_of: pointer -> ``"cpu"`` or ``"cuda:N"``.
    """

    def __init__(self, engine: Any, device_of: Callable[[int], str]) -> None:
        self._engine = engine
        self._device_of = device_of
        self._spans: list[_Span] = []
        self.generation = 0  # changes whenever region ids may have

    def add(self, pointers: Iterable[int], lengths: Iterable[int]) -> None:
        """Register pieces. Empty ones are left out; one inside a registered region only counts.

        Raises:
            pdxfer.PdxferError: the engine refuses the memory.
        """
        pieces = [(int(p), int(n)) for p, n in zip(pointers, lengths, strict=True) if int(n) > 0]
        fresh = [piece for piece in pieces if self._span_of(*piece) is None]
        for begin, end in merge_overlapping(fresh):
            device = self._device_of(begin)
            region = self._engine.register_memory((begin, end - begin, device))
            self._spans.append(_Span(begin, end, device, region))
        for pointer, length in pieces:
            span = self._span_of(pointer, length)
            if span is not None:
                span.pieces[pointer] = span.pieces.get(pointer, 0) + 1
        self.generation += 1

    def remove(self, pointers: Iterable[int]) -> None:
        """Take pieces back; a pointer that is not registered is passed over, so that tearing down twice is harmless."""
        for pointer in map(int, pointers):
            span = next((s for s in self._spans if pointer in s.pieces), None)
            if span is None:
                continue
            span.pieces[pointer] -= 1
            if span.pieces[pointer] == 0:
                del span.pieces[pointer]
            if not span.pieces:
                self._spans.remove(span)
                self._engine.deregister_memory(span.region)
        self.generation += 1

    def _span_of(self, pointer: int, length: int) -> _Span | None:
        return next((span for span in self._spans if span.holds(pointer, length)), None)

    def regions(self) -> list[Any]:
        """The engine's regions, as registered."""
        return [span.region for span in self._spans]

    def device_bytes(self) -> dict[str, int]:
        """Bytes registered with the engine, by device: ``"cpu"``, ``"cuda:N"``."""
        found: dict[str, int] = {}
        for span in self._spans:
            found[span.device] = found.get(span.device, 0) + span.end - span.begin
        return found

    def __len__(self) -> int:
        return len(self._spans)


def locate(regions: Iterable[Any], pointers: IntArray, lengths: IntArray, whose: str) -> tuple[IntArray, IntArray]:
    """Region ids and offsets of many address ranges at once.

    Args:
        regions: objects with `id`, `pointer` and `bytes`.
        pointers, lengths: int64, shape (n,), bytes.
        whose: for the error's text: ``"this rank"`` or the peer's name.

    Returns:
        (ids, offsets): int64, shape (n,).

    Raises:
        ValueError: an address range lies outside every region.
    """
    table = np.array(sorted((r.pointer, r.bytes, r.id) for r in regions), dtype=np.int64).reshape(-1, 3)
    at = np.searchsorted(table[:, 0], pointers, side="right") - 1
    row = table[np.maximum(at, 0)] if len(table) else np.zeros((len(pointers), 3), dtype=np.int64)
    offsets = pointers - row[:, 0]
    bad = (at < 0) | (offsets + lengths > row[:, 1])
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{int(lengths[first])} bytes at {int(pointers[first]):#x} are not registered memory of {whose} "
            f"({len(table)} regions)"
        )
    return row[:, 2], offsets
