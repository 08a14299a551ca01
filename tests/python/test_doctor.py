"""pdxfer doctor: the report's shape, that it is honest about this machine, and what it says of other machines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pdxfer import cli, doctor


@pytest.fixture(scope="module")
def found() -> dict:
    return doctor.report()


def probes(**works: bool) -> dict:
    names = ("process_vm_writev", "memfd", "userfaultfd", "adopt", "ipv6")
    return {name: {"works": works.get(name, True), "detail": f"detail of {name}"} for name in names}


def facts(**changes: object) -> dict:
    base = {
        "gpus": {"devices": [], "reason": "libcuda.so.1: not found"},
        "nics": [],
        "libraries": {"ibverbs": {"present": True, "reason": ""}},
        "pdxfer": {"device_code": {"present": True, "reason": ""}},
        "transports": [{"name": "shm"}, {"name": "tcp"}],
    }
    return {**base, **changes}


def rows(found: dict, probed: dict) -> dict[str, dict]:
    return {row["peer"]: row for row in doctor.judge(found, probed)}


def test_json_is_one_object_with_every_documented_key() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pdxfer.cli", "doctor", "--json"], capture_output=True, text=True, timeout=60, check=True
    )
    told = json.loads(run.stdout)
    assert set(told) == {
        "schema", "pdxfer", "transports", "python", "kernel", "gpus", "nics", "rdma", "limits", "libraries",
        "container", "peers",
    }  # fmt: skip
    assert run.stderr == ""
    assert told["schema"] == 1
    for row in told["peers"]:
        assert set(row) == {"peer", "transport", "path", "better", "next_step"}
    documented = doctor.__doc__ or ""
    for key in set(told) | set(told["kernel"]) | set(told["gpus"]) | set(told["container"]) | {"usable", "ptx_version"}:
        assert f"``{key}``" in documented, f"the docstring does not name {key}"


def test_text_has_every_section(found: dict) -> None:
    text = doctor.render(found)
    for section in ("device code", "GPUs", "RDMA NICs", "Kernel and limits", "Libraries", "Peers"):
        assert section in text
    assert "same machine, host memory: shm" in text
    assert "other machine, host memory: tcp" in text


def test_facts_agree_with_the_machine(found: dict) -> None:
    assert found["kernel"]["release"] == os.uname().release
    assert found["kernel"]["cpus"] == len(os.sched_getaffinity(0))
    assert {nic["device"] for nic in found["nics"]} == {p.name for p in Path("/sys/class/infiniband").glob("*")}
    code = found["pdxfer"]["device_code"]
    assert code["present"] == bool(code["archs"]) == (code["reason"] == "")


def test_probes_leave_nothing_behind() -> None:
    doctor.report()  # libraries load once
    before = sorted(os.listdir("/proc/self/fd"))
    doctor.report()
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_settings_are_named_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDXFER_SECRET", "do-not-print-me")
    told = doctor.report()
    assert told["pdxfer"]["settings"].count("PDXFER_SECRET") == 1
    assert "do-not-print-me" not in json.dumps(told) + doctor.render(told)


@pytest.mark.parametrize(
    ("works", "path", "says"),
    [
        ({}, "mapped", None),
        ({"adopt": False, "userfaultfd": False}, "process_vm_writev", "detail of adopt"),
        ({"adopt": False, "process_vm_writev": False}, "staging ring", "detail of process_vm_writev"),
    ],
)
def test_same_machine(works: dict, path: str, says: str | None) -> None:
    row = rows(facts(), probes(**works))["same machine, host memory"]
    assert row["transport"] == "shm"
    assert path in row["path"]
    assert (row["better"] is None) == (says is None) == (row["next_step"] is None)
    assert says is None or says in row["better"]


def test_other_machine_names_the_obstacle_to_rdma() -> None:
    nic = {
        "device": "mlx5_0",
        "port": "1",
        "state": "DOWN",
        "usable": False,
        "trouble": "mlx5_0 port 1: port is down (DOWN): ip link set eth0 up",
    }
    kind = "other machine, host memory"
    assert "no RDMA NIC" in rows(facts(), probes())[kind]["better"]
    assert "mlx5_0 port 1: port is down" in rows(facts(nics=[nic]), probes())[kind]["better"]
    up = {**nic, "state": "ACTIVE", "usable": True, "trouble": None}
    missing = {"ibverbs": {"present": False, "reason": "libibverbs.so.1: not found"}}
    told = rows(facts(nics=[up], libraries=missing), probes())[kind]
    assert "libibverbs.so.1" in told["better"]
    assert "rdma-core" in told["next_step"]
    assert "no rdma transport yet" in rows(facts(nics=[up]), probes())[kind]["better"]
    ready = rows(facts(nics=[up], transports=[{"name": "rdma"}]), probes())[kind]
    assert (ready["transport"], ready["better"]) == ("rdma", None)


def test_gpu_names_the_first_obstacle() -> None:
    kind = "same machine, GPU memory"
    gpus = {"devices": [{"image": "sm_90"}], "reason": ""}
    none = {"device_code": {"present": False, "reason": "no CUDA compiler found"}}
    ipc = [{"name": "cuda_ipc"}]
    assert "libcuda.so.1" in rows(facts(), probes())[kind]["better"]
    told = rows(facts(gpus=gpus, pdxfer=none), probes())[kind]
    assert told["transport"] is None
    assert "no CUDA compiler found" in told["better"]
    assert "gotchas.md, Device code" in told["next_step"]
    assert "host memory only" in rows(facts(gpus=gpus), probes())[kind]["better"]
    old = {"devices": [{"image": ""}], "reason": ""}
    assert "older than" in rows(facts(gpus=old, transports=ipc), probes())[kind]["better"]
    assert rows(facts(gpus=gpus, transports=ipc), probes())[kind]["transport"] == "cuda_ipc"


def test_gpu_memory_goes_to_other_machines_as_host_memory_does() -> None:
    kind = "other machine, GPU memory"
    gpus = {"devices": [{"image": "sm_90"}], "reason": ""}
    every = [{"name": name} for name in ("cuda_ipc", "rdma", "tcp")]
    streamed = rows(facts(gpus=gpus, transports=every), probes())[kind]
    assert streamed["transport"] == "tcp"
    assert "no RDMA NIC" in streamed["better"]
    nic = {"device": "mlx5_0", "port": "1", "state": "ACTIVE", "usable": True, "trouble": None}
    direct = rows(facts(gpus=gpus, transports=every, nics=[nic]), probes())[kind]
    assert (direct["transport"], direct["better"]) == ("rdma", None)


def test_report_survives_missing_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_SYSFS", tmp_path / "no-sys")
    monkeypatch.setattr(doctor, "_PROC", tmp_path / "no-proc")
    told = doctor.report()
    assert told["container"]["network_namespace"] == ""
    assert "Peers" in doctor.render(told)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pdxfer ")
    assert cli.main([]) == 0
    assert "doctor" in capsys.readouterr().out
    assert cli.main(["dance"]) == 2
    assert "no command 'dance'" in capsys.readouterr().err
    assert cli.main(["doctor"]) == 0
    assert "Peers" in capsys.readouterr().out


def test_a_closed_pipe_is_no_traceback() -> None:
    run = subprocess.run(
        f"{sys.executable} -m pdxfer.cli doctor | true", shell=True, capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in run.stderr
