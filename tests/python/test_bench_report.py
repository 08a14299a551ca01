"""The bench's results: a table that fits, JSON that is whole or not there, a plot."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from pdxfer.bench import plot
from pdxfer.bench.errors import BenchError
from pdxfer.bench.report import WIDTH, JsonFile, arrange, table


def row(**changes: Any) -> dict[str, Any]:
    out: dict[str, Any] = {
        "peer": None,
        "label": "Qwen2.5-7B p1 random",
        "transport": "shm",
        "path": "mapped: 56 regions",
        "reason": "",
        "note": "",
        "wrong": None,
        "memory": "host",
        "model": "Qwen2.5-7B",
        "page_size": 1,
        "tokens": 4096,
        "pattern": "random",
        "tp": "1:1",
        "pairs": 56,
        "runs": 4096,
        "bytes": 234881024,
        "versions": {},
        "machine": {"cpu": "test", "cores": 2},
        "gbps": 5.0,
        "p50_ms": 46.9,
        "p99_ms": 50.1,
        "plan_us": 900.0,
        "repeats": 15,
        "ceiling_gbps": 6.0,
        "ceiling_kind": "memcpy",
        "ceiling_1stream_gbps": None,
        "percent_of_ceiling": 83.3,
        "verified": True,
        "failed": None,
    }
    return out | changes


ROWS = [
    row(),
    row(label="DeepSeek-V3 p64 busy-decode TP 2:1", pairs=188, runs=123456, bytes=10**12, p50_ms=123456.78, gbps=0.01),
    row(transport="tcp", path="4 streams to 127.0.0.1:1234", reason="not shm: other host", ceiling_1stream_gbps=2.5),
    row(peer="nixl", gbps=0.5, note="a descriptor per run"),
    row(peer="mooncake", transport="tcp", gbps=None, failed="queue full " * 30, verified=False),
]


def test_table_fits_and_names_everything() -> None:
    text = table(ROWS)
    assert max(len(line) for line in text.splitlines()) <= WIDTH
    for part in ("mapped: 56 regions", "not shm: other host", "10.0x", "FAILED: queue full", "83%", "ceiling", "2.50"):
        assert part in text, part


def test_peers_follow_their_row() -> None:
    ordered = arrange(ROWS)
    assert [(r["transport"], r["peer"]) for r in ordered] == [
        ("shm", None),
        ("shm", "nixl"),
        ("shm", None),
        ("tcp", None),
        ("tcp", "mooncake"),
    ]
    assert ordered[1]["pdxfer_times"] == 10 and ordered[4]["pdxfer_times"] is None


def test_a_peer_without_our_row_is_kept() -> None:
    alone = row(peer="nixl", label="something else")
    assert arrange([row(), alone])[1] is alone
    assert "nixl" in table([alone])


def test_what_is_wrong_is_shouted() -> None:
    text = table([row(verified=False, wrong="buffer 3, entry 9: got 0x00"), row(verified=False)])
    assert "WRONG: buffer 3, entry 9" in text
    assert [line.split()[-1] for line in text.splitlines() if "56 x" in line] == ["WRONG", "NO"]


def test_json_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("old")
    file = JsonFile(str(path))
    assert path.read_text() == "old"
    file.write(ROWS)
    file.discard()
    assert json.loads(path.read_text()) == ROWS
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.json"]


def test_an_abandoned_run_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("old")
    JsonFile(str(path)).discard()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.json"]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="No such file or directory"):
        JsonFile(str(tmp_path / "none" / "rows.json"))
    with pytest.raises(BenchError, match="is a directory"):
        JsonFile(str(tmp_path))


def test_a_full_disk_is_found_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BenchError, match="No space left"):
        JsonFile(str(tmp_path / "rows.json"))
    assert list(tmp_path.iterdir()) == []


def test_a_full_device_is_an_error_not_a_file() -> None:
    before = os.stat("/dev/full").st_mode
    with pytest.raises(BenchError, match="/dev/full: not written: No space left"):
        JsonFile("/dev/full").write(ROWS)
    assert os.stat("/dev/full").st_mode == before


def test_a_disk_that_fills_up_later_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    path.write_text("old")
    file = JsonFile(str(path))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BenchError, match="not written: No space left"):
        file.write(ROWS)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.json"]


def test_plot(tmp_path: Path) -> None:
    path = tmp_path / "rows.png"
    plot.require(str(path))
    plot.draw(ROWS, str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchError, match="ends in .png"):
        plot.require("rows.txt")
    with pytest.raises(BenchError, match="no directory"):
        plot.require(str(tmp_path / "none" / "rows.png"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BenchError, match=r'pip install "pdxfer\[plot\]"'):
        plot.require("rows.png")
