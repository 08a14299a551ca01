"""The hello between engines, and what SGLang versions and interfaces are accepted."""

from __future__ import annotations

from typing import Any

import pytest

from pdxfer.sglang.interface import parse_version, probe_manager, version_note
from pdxfer.sglang.wire import decode_hello, encode_hello, endpoint_of


def test_hello_round_trip() -> None:
    assert decode_hello(encode_hello("10.0.0.1:1234")) == "10.0.0.1:1234"
    assert endpoint_of("[fd00::1]", 5) == endpoint_of("fd00::1", "5")


@pytest.mark.parametrize(
    "tail", [b"", b"\xff\xfe", b"[]", b"{}", b'{"v": 2, "endpoint": "a:1"}', b'{"v": 1, "endpoint": 5}', b"x" * 5000]
)
def test_other_bytes_are_no_hello(tail: bytes) -> None:
    assert decode_hello(tail) is None


@pytest.mark.parametrize(
    ("text", "goes_on", "says"),
    [
        ("0.5.17", True, ""),
        ("0.5.20.post1", True, ""),
        ("0.5.23", True, ""),
        ("0.5.16", False, "too old"),
        ("0.4.9.post2", False, "too old"),
        ("0.5.24", True, "newer than 0.5.17 to 0.5.23"),
        ("0.6.0rc1", True, "newer"),
        ("unknown", True, "not one of"),
    ],
)
def test_versions(text: str, goes_on: bool, says: str) -> None:
    allowed, note = version_note(text)
    assert allowed == goes_on
    assert says in note and bool(says) == bool(note)
    assert "\n" not in note


def test_parse_version() -> None:
    assert parse_version("0.5.20.post1") == (0, 5, 20)
    assert parse_version("main") is None


def manager_of(**changed: Any) -> type[Any]:
    from fake_sglang import MooncakeKVManager

    return type("MooncakeKVManager", (MooncakeKVManager,), changed)


def test_a_manager_that_fits_has_no_differences() -> None:
    assert probe_manager(manager_of()) == []


def test_differences_are_named() -> None:
    def send_aux(self: Any, request: Any) -> int:
        return 0

    assert any("send_aux takes (request)" in text for text in probe_manager(manager_of(send_aux=send_aux)))
    assert any("transfer_worker is gone" in text for text in probe_manager(manager_of(transfer_worker=None)))
