"""``--disaggregation-ib-device`` in every documented form, and the wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pdxfer
from pdxfer.sglang.ib_device import IbDeviceError, devices_present, parse, rdma_options, select

PRESENT = ["mlx5_0", "mlx5_1", "mlx5_2"]


@pytest.mark.parametrize(
    ("value", "gpu", "names"),
    [
        ("mlx5_0", 3, ["mlx5_0"]),
        ("mlx5_0,mlx5_1", 0, ["mlx5_0", "mlx5_1"]),
        (" mlx5_0 , mlx5_1 ", 0, ["mlx5_0", "mlx5_1"]),
        ("mlx5_1,mlx5_1", 0, ["mlx5_1"]),
        ('{"0": "mlx5_0,mlx5_1", "1": "mlx5_2"}', 0, ["mlx5_0", "mlx5_1"]),
        ('{"0": "mlx5_0,mlx5_1", "1": "mlx5_2"}', 1, ["mlx5_2"]),
        (None, 0, []),
    ],
)
def test_documented_forms(value: str | None, gpu: int, names: list[str]) -> None:
    assert select(value, gpu, PRESENT) == (names, "")


def test_a_file_with_the_map(tmp_path: Path) -> None:
    path = tmp_path / "devices.json"
    path.write_text(json.dumps({"0": "mlx5_0", "1": "mlx5_1,mlx5_2"}))
    assert select(str(path), 1, PRESENT) == (["mlx5_1", "mlx5_2"], "")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("", "nothing given"),
        ("  ", "nothing given"),
        ("mlx5_0,,mlx5_1", "empty name"),
        ("mlx5_0 mlx5_1", "not a device name"),
        ("{not json", "not JSON"),
        ("{}", "at least one entry"),
        ('{"zero": "mlx5_0"}', "GPU numbers"),
        ('{"0": ["mlx5_0"]}', "not list"),
        ('{"0": ""}', "empty name"),
        ("/no/such/file", "there is no file"),
        ("devices.json", "there is no file"),
    ],
)
@pytest.mark.parametrize("present", [[], PRESENT])
def test_wrong_syntax_is_refused_with_or_without_rdma(value: str, text: str, present: list[str]) -> None:
    with pytest.raises(IbDeviceError, match=text) as caught:
        select(value, 0, present)
    assert "--disaggregation-ib-device" in str(caught.value)


def test_a_file_without_json(tmp_path: Path) -> None:
    path = tmp_path / "devices.json"
    path.write_text("mlx5_0")
    with pytest.raises(IbDeviceError, match="is not JSON"):
        parse(str(path))


def test_an_unknown_device_lists_those_present() -> None:
    with pytest.raises(IbDeviceError, match="no such device: mlx5_9; this machine has mlx5_0, mlx5_1, mlx5_2"):
        select("mlx5_0,mlx5_9", 0, PRESENT)


def test_a_map_without_this_gpu() -> None:
    with pytest.raises(IbDeviceError, match="no entry for GPU 4"):
        select('{"0": "mlx5_0"}', 4, PRESENT)


def test_without_rdma_a_valid_value_is_a_note() -> None:
    names, note = select('{"0": "mlx5_0"}', 7, [])
    assert names == []
    assert "has no effect" in note


def test_devices_present(tmp_path: Path) -> None:
    assert devices_present(tmp_path / "missing") == []
    for name in ("mlx5_1", "mlx5_0"):
        (tmp_path / name).mkdir()
    assert devices_present(tmp_path) == ["mlx5_0", "mlx5_1"]


@pytest.mark.parametrize(
    ("existing", "names", "gpu", "setting"),
    [
        ("", [], None, ""),
        ("", ["mlx5_0"], None, "devices=mlx5_0"),
        ("", ["mlx5_0", "mlx5_1"], 3, "devices=mlx5_0;mlx5_1,gpu=3"),
        ("tc=106,gid=3", ["mlx5_0"], 0, "tc=106,gid=3,devices=mlx5_0,gpu=0"),
        ("devices=mlx5_5,qps=4", [], 1, "devices=mlx5_5,qps=4,gpu=1"),
        ("gpu=7", [], 1, "gpu=7"),
    ],
)
def test_the_devices_reach_the_engines_setting(existing: str, names: list[str], gpu: int | None, setting: str) -> None:
    assert rdma_options(existing, names, gpu) == (setting, "")
    assert pdxfer.Config(environment=False, rdma=setting).items()["rdma"] == setting


def test_the_command_line_wins_over_the_variable_and_says_so() -> None:
    setting, note = rdma_options("devices=mlx5_5,tc=106", ["mlx5_0"], None)
    assert setting == "devices=mlx5_0,tc=106"
    assert "takes the place of devices=mlx5_5 in PDXFER_RDMA" in note
