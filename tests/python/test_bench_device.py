"""The bench on device memory, with a CUDA driver that has no GPU behind it: pools, ceilings, verification, a peer."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pdxfer.bench.movers import Options, mapped
from pdxfer.bench.peers import mooncake, nixl

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a libcuda.so.1."""
    out = tmp_path_factory.mktemp("fake-cuda")
    source = HERE / "fake_cuda" / "libcuda.c"
    command = ["cc", "-shared", "-fPIC", "-O2", "-o", out / "libcuda.so.1", source, "-lpthread"]
    subprocess.run(command, check=True)
    return out


def bench(driver: Path, tmp_path: Path, *options: str, **environment: str) -> list[dict]:
    """The rows of a run. pdxfer's own rows fail here, since no kernel can run, and must say so."""
    path = tmp_path / "rows.json"
    fixed = ["--memory", "device", "--repeats", "3", "--json", str(path), "--peer", "memcpy-batch"]
    ran = subprocess.run(
        [sys.executable, "-m", "pdxfer.bench", *fixed, *options],
        env={**os.environ, "LD_LIBRARY_PATH": str(driver), **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert path.exists(), ran.stderr
    return json.loads(path.read_text())


def peers(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["peer"] == "memcpy-batch"]


@pytest.mark.parametrize("shape", [["--page-size", "1"], ["--page-size", "16", "--tp", "2:1"], ["--raw", "4096"]])
def test_a_driver_copy_of_pages_is_verified(driver: Path, tmp_path: Path, shape: list[str]) -> None:
    rows = bench(driver, tmp_path, "--tokens", "64", "--pattern", "random,busy-decode", *shape)
    assert len(peers(rows)) == 2
    for row in peers(rows):
        assert row["failed"] is None and row["wrong"] is None and row["verified"]
        assert row["memory"] == "device" and row["gpu"] == "Fake GPU 0"
        assert row["ceiling_kind"] == "cudaMemcpyPeer of 1 GiB" and row["ceiling_gbps"] > 0
    assert all(row["failed"] for row in rows if not row["peer"])


def test_where_pdxfer_may_not_map_memory_no_library_does(
    driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = bench(driver, tmp_path, "--tokens", "64", "--raw", "4096", "--set", "cuda=path=staging")
    assert rows and not peers(rows)
    staged = Options("cuda_ipc", {"cuda": "sm_budget=8,path=staging"}, memory="device")
    for options, may in [(staged, False), (replace(staged, settings={}), True)]:
        assert mapped(options) == may
        assert ("cuda_ipc" in nixl._tls(options)) == may
        assert mooncake._nvlink(options) == may
    monkeypatch.setenv("PDXFER_CUDA", "path=staging")
    assert not mapped(replace(staged, settings={}))


@pytest.mark.parametrize(
    ("fault", "pattern", "text"),
    [("skip", "random", "sampled bytes had not arrived"), ("stray", "contiguous", "outside the target pages")],
)
def test_what_went_wrong_on_a_gpu_is_seen(driver: Path, tmp_path: Path, fault: str, pattern: str, text: str) -> None:
    rows = bench(driver, tmp_path, "--tokens", "64", "--raw", "65536", "--pattern", pattern, FAKE_CUDA_FAULT=fault)
    (row,) = peers(rows)
    assert not row["verified"] and text in (row["wrong"] or row["failed"])


def test_each_end_sees_its_own_gpu_when_isolated(driver: Path, tmp_path: Path) -> None:
    rows = bench(driver, tmp_path, "--tokens", "64", "--page-size", "1", "--isolate", "--sm-budget", "8,16")
    (row,) = peers(rows)
    assert row["isolated"] and row["verified"] and row["sm_budget"] == 8
    assert [r["sm_budget"] for r in rows if not r["peer"]] == [8, 16]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--memory", "device", "--device", "0"], "expected SRC:DST"),
        (["--sm-budget", "8"], "go with --memory device"),
        (["--memory", "device", "--burst", "3"], "expected 0, or 5 to 1000"),
        (["--peer", "nccl"], "give --memory device"),
        (["--memory", "device", "--device", "0:7"], "this process sees 2 GPUs"),
    ],
)
def test_a_wrong_option_is_one_line(driver: Path, options: list[str], text: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pdxfer.bench", "--tokens", "64", *options],
        env={**os.environ, "LD_LIBRARY_PATH": str(driver)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 2 and text in ran.stderr
