"""Device memory between two processes, each seeing its own GPU alone: `pytest tests/gpu -m gpu`. Needs two GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pdxfer import _core

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> None:
    cuda = _core.cuda_info()
    assert len(cuda["devices"]) >= 2, cuda["reason"] or "these tests need two GPUs"


def rows(tmp_path: Path, *options: str) -> list[dict]:
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pdxfer.bench", "--memory", "device", "--repeats", "3", "--json", str(path)]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize("isolate", [[], ["--isolate"]])
@pytest.mark.parametrize("device", ["0:1", "1:0"])
def test_every_byte_of_every_pattern_is_right(tmp_path: Path, device: str, isolate: list[str]) -> None:
    shape = ["--tokens", "512", "--page-size", "1,16", "--pattern", "random,contiguous,busy-decode"]
    found = rows(tmp_path, "--device", device, *isolate, *shape)
    assert len(found) == 6
    assert all(row["verified"] and row["transport"] == "cuda_ipc" for row in found)


@pytest.mark.parametrize("shape", [["--tp", "4:1", "--page-size", "16"], ["--model", "DeepSeek-V3"], ["--raw", "1000"]])
def test_slices_latent_rows_and_odd_sizes(tmp_path: Path, shape: list[str]) -> None:
    assert all(row["verified"] for row in rows(tmp_path, "--tokens", "512", *shape))


def test_long_runs_in_buffers_that_lie_next_to_one_another(tmp_path: Path) -> None:
    """Each buffer is an allocation of its own, which the driver places at even distances; no copy may leave one."""
    shape = ["--tokens", "16384", "--page-size", "1", "--pattern", "contiguous"]
    found = rows(tmp_path, *shape)
    assert found[0]["verified"] and "copy engine for" in found[0]["path"]


def test_both_directions_and_small_transfers(tmp_path: Path) -> None:
    found = rows(tmp_path, "--tokens", "512", "--page-size", "1", "--study", "latency,duplex")
    studied = [row for row in found if row.get("study")]
    assert {row["study"] for row in studied} == {"latency", "duplex"}
    assert all(row["verified"] for row in studied)


def test_checksums_of_what_is_moved_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDXFER_CUDA", "checksum=on")
    shapes = "--pattern random,contiguous,busy-decode", "--tp 4:1 --page-size 16", "--raw 1000"
    for shape in shapes:
        found = rows(tmp_path, "--tokens", "512", *shape.split())
        assert all(row["verified"] and "sum what they read" in row["path"] for row in found)
