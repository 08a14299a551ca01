"""The ways into a server: tokenizer workers, the router, text requests; and options that must be refused clearly."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import client
import pytest
from conftest import NEWEST, OLDEST, Starter
from servers import Sglang, role, router


def words(ids: client.Tokens) -> str:
    return " ".join(f"<t{i}>" for i in ids)


@pytest.mark.parametrize("version", [NEWEST, pytest.param(OLDEST, marks=pytest.mark.full)])
def test_tokenizer_workers_and_router(
    version: str,
    start_pair: Starter,
    reference: Callable[..., list[client.Tokens]],
    sglang: Callable[[str], Sglang],
    logs: Path,
) -> None:
    pair = start_pair(
        version,
        "llama",
        "--page-size",
        "16",
        "--tokenizer-worker-num",
        "2",
        "--disable-overlap-schedule",
        tokenizer=True,
    )
    prompts, wanted = client.prompts(), reference("llama")
    assert client.through_pair(pair, prompts) == wanted
    front = router(sglang(version).python, pair, logs / f"{version}-router.log")
    try:
        front.start().wait_ready(60)
        assert client.through_url(front.url, prompts) == wanted
        text = client.post(front.url + "/generate", {"text": words(prompts[5]), "sampling_params": client.SAMPLING})
        assert text.status == 200, text.body
        assert text.body["text"].split() == words(wanted[5]).split()
    finally:
        front.stop()


WRONG_DEVICES = {
    "mlx5_0,,mlx5_1": "empty name",
    '{"0": 5}': "must be text with device names",
    "/nowhere/devices.json": "there is no file",
}


def test_a_wrong_ib_device_stops_the_manager(sglang: Callable[[str], Sglang]) -> None:
    """The manager refuses before it touches memory or the network; whole servers would only take longer to say so."""
    code = f"""
import types
from pdxfer.sglang.manager import PdxKVManager
for value, text in {WRONG_DEVICES!r}.items():
    try:
        PdxKVManager(types.SimpleNamespace(ib_device=value, gpu_id=0), None, None)
    except ValueError as error:
        assert "--disaggregation-ib-device" in str(error) and text in str(error), error
    else:
        raise AssertionError(value)
"""
    result = subprocess.run([sglang(NEWEST).python, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.full
def test_valid_ib_devices_without_rdma_do_not_stop_a_server(
    sglang: Callable[[str], Sglang], model: Callable[[str], Path], tmp_path: Path
) -> None:
    mapping = tmp_path / "devices.json"
    mapping.write_text(json.dumps({"0": "mlx5_0"}))
    for value in ("mlx5_0", "mlx5_0,mlx5_1", '{"0": "mlx5_0"}', str(mapping)):
        server = sglang(NEWEST).server(
            "ib", model("llama"), *role(sglang(NEWEST), "decode", 0), "--disaggregation-ib-device", value
        )
        try:
            server.start().wait_ready()
            assert "has no effect: this machine has no RDMA device" in server.text()
        finally:
            server.stop()


def test_help_lists_the_backend(sglang: Callable[[str], Sglang]) -> None:
    for version in (NEWEST, OLDEST):
        command = [sglang(version).python, "-m", "sglang.launch_server", "--help"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=180)
        choices = result.stdout.split("--disaggregation-transfer-backend", 1)[1].split("}", 1)[0]
        assert "pdxfer" in choices, choices
        assert "pdxfer:" not in result.stderr, "a supported SGLang gives no warning"
