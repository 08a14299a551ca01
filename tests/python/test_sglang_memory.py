"""Registering what SGLang registers: twice, empty, nested and overlapping; and finding addresses in regions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pdxfer
from pdxfer.sglang.memory import MemoryTable, locate, merge_overlapping


@pytest.mark.parametrize(
    ("pieces", "merged"),
    [
        ([], []),
        ([(100, 0)], []),
        ([(100, 10), (110, 10)], [(100, 110), (110, 120)]),
        ([(100, 10), (105, 10)], [(100, 115)]),
        ([(100, 50), (110, 10), (120, 40)], [(100, 160)]),
        ([(200, 10), (100, 10), (100, 10)], [(100, 110), (200, 210)]),
    ],
)
def test_merging(pieces: list[tuple[int, int]], merged: list[tuple[int, int]]) -> None:
    assert merge_overlapping(pieces) == merged


@pytest.fixture
def engine() -> Any:
    with pdxfer.Engine(pdxfer.Config(transports="loopback")) as engine:
        yield engine


def test_regions_are_registered_once_and_given_back_with_their_last_user(engine: Any) -> None:
    pool = np.zeros(4096, dtype=np.uint8)
    base = pool.ctypes.data
    table = MemoryTable(engine, lambda pointer: "cpu")
    table.add([base, base, base + 256, base + 2048], [1024, 1024, 128, 0])
    assert len(table) == 1 and table.device_bytes() == {"cpu": 1024}
    region, offset = engine.find_region(base + 256, 128)
    assert (region.bytes, offset) == (1024, 256)
    generation = table.generation
    table.add([base + 2048], [1024])
    assert len(table) == 2 and table.generation > generation
    table.remove([base])
    table.remove([base])
    assert len(table) == 2, "the piece inside is still in use"
    table.remove([base + 256])
    with pytest.raises(pdxfer.InvalidError):
        engine.find_region(base, 16)
    table.remove([base + 2048])
    table.remove([base + 2048, base, 12345])  # twice is harmless
    assert len(table) == 0
    table.add([base], [4096])  # and again, as after resuming memory
    assert table.device_bytes() == {"cpu": 4096}


def test_lists_of_unequal_length_are_refused(engine: Any) -> None:
    with pytest.raises(ValueError):
        MemoryTable(engine, lambda pointer: "cpu").add([1, 2], [3])


def test_locating_many_addresses() -> None:
    regions = [SimpleNamespace(id=7, pointer=1000, bytes=100), SimpleNamespace(id=3, pointer=5000, bytes=50)]
    ids, offsets = locate(regions, np.array([5010, 1000, 1099]), np.array([40, 100, 1]), "this rank")
    assert ids.tolist() == [3, 7, 7]
    assert offsets.tolist() == [10, 0, 99]


@pytest.mark.parametrize(("pointer", "length"), [(999, 1), (1000, 101), (1100, 1), (5050, 1), (0, 1)])
def test_an_address_outside_is_named(pointer: int, length: int) -> None:
    regions = [SimpleNamespace(id=7, pointer=1000, bytes=100), SimpleNamespace(id=3, pointer=5000, bytes=50)]
    with pytest.raises(ValueError, match=f"{length} bytes at {pointer:#x} are not registered memory of that peer"):
        locate(regions, np.array([1000, pointer]), np.array([1, length]), "that peer")


def test_no_region_at_all() -> None:
    with pytest.raises(ValueError, match="0 regions"):
        locate([], np.array([1]), np.array([1]), "this rank")
