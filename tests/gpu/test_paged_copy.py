"""The device kernel on a real GPU: `pytest tests/gpu -m gpu`. Left out of every other run by the marker."""

import shutil
import subprocess
import sys

import pytest

from pdxfer import _core

SELFTEST = """
from pdxfer import _core
result = _core.device_paged_copy_selftest(7, 60, 0)
assert result["failure"] == "" and result["cases"] == 60, result
"""

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpus() -> list[dict]:
    """The GPUs here; asking for these tests on a machine without one is a failure."""
    cuda = _core.cuda_info()
    assert cuda["devices"], cuda["reason"]
    return cuda["devices"]


def test_the_module_carries_an_image_for_every_gpu_here(gpus: list[dict]) -> None:
    assert all(device["image"] for device in gpus), _core.device_code()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_copies_agree_with_the_cpu(seed: int, gpus: list[dict]) -> None:
    for device in gpus:
        result = _core.device_paged_copy_selftest(seed, 400, device["ordinal"])
        assert result["failure"] == ""
        assert result["cases"] == 400
        assert result["bytes"] > 10_000_000


@pytest.mark.parametrize(
    ("tool", "verdict"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards"),
        ("synccheck", "ERROR SUMMARY: 0 errors"),
    ],
)
def test_random_copies_are_clean_under_compute_sanitizer(tool: str, verdict: str, gpus: list[dict]) -> None:
    """Needs the CUDA toolkit, and a virtual machine that lets a process debug its GPU (gVisor does not)."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SELFTEST],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and verdict in done.stdout, done.stdout[-4000:]


def test_a_device_that_does_not_exist_is_a_clear_error(gpus: list[dict]) -> None:
    with pytest.raises(_core.UnavailableError, match="CUDA device 99 does not exist"):
        _core.device_paged_copy_selftest(1, 1, 99)
