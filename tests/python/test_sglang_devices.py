"""Which device a pointer belongs to: what is asked of the driver and what is made of its answers."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

import pdxfer
from pdxfer.sglang.devices import PointerDevices
from pdxfer.sglang.memory import MemoryTable

PAGEABLE, PINNED, GPU0, GPU1, BROKEN = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000


class Driver:
    """The driver of a process that sees two GPUs: memory type (2) and ordinal (9) of the pointers above."""

    known = {PINNED: {2: 1, 9: 0}, GPU0: {2: 2, 9: 0}, GPU1: {2: 2, 9: 1}}

    def __init__(self) -> None:
        self.asked: list[int] = []

    def cuPointerGetAttribute(self, answer: int, attribute: int, pointer: int) -> int:
        self.asked.append(pointer)
        if pointer == BROKEN:
            return 700
        if pointer not in self.known:
            return 1
        ctypes.c_int.from_address(answer).value = self.known[pointer][attribute]
        return 0


def test_a_gpu_server_asks_for_each_pointer() -> None:
    device_of = PointerDevices(True, Driver)
    assert [device_of(p) for p in (GPU1, PAGEABLE, PINNED, GPU0)] == ["cuda:1", "cpu", "cpu", "cuda:0"]


def test_a_cpu_server_never_opens_the_driver() -> None:
    def fail() -> Any:
        raise AssertionError("opened")

    assert PointerDevices(False, fail)(GPU1) == "cpu"


def test_an_error_of_the_driver_is_named() -> None:
    with pytest.raises(pdxfer.UnavailableError, match="0x5000 failed with CUDA error 700"):
        PointerDevices(True, Driver)(BROKEN)


def test_no_driver_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdxfer.sglang.devices._LIBRARY", "libnot-there.so.1")
    with pytest.raises(pdxfer.UnavailableError, match=r"libnot-there.so.1 cannot be opened.*pdxfer doctor"):
        PointerDevices(True)(GPU0)


class Engine:
    """Takes any registration."""

    def __init__(self) -> None:
        self.registered: list[tuple[int, int, str]] = []

    def register_memory(self, memory: tuple[int, int, str]) -> object:
        self.registered.append(memory)
        return object()


def test_regions_are_registered_with_their_device() -> None:
    engine = Engine()
    table = MemoryTable(engine, PointerDevices(True, Driver))
    table.add([GPU0, PAGEABLE, GPU1], [64, 32, 16])
    assert sorted(engine.registered) == [(PAGEABLE, 32, "cpu"), (GPU0, 64, "cuda:0"), (GPU1, 16, "cuda:1")]
    assert table.device_bytes() == {"cuda:0": 64, "cpu": 32, "cuda:1": 16}
