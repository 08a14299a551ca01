"""doctor about RDMA, on sysfs trees of machines that are not here: every obstacle in words, with its next step."""

import os
import resource
from pathlib import Path

import pytest

from pdxfer import _core, doctor, doctor_rdma

V4 = "0000:0000:0000:0000:0000:ffff:0a00:0001"
LOCAL = "fe80:0000:0000:0000:0e42:a1ff:fe5f:0a00"


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def pci(root: Path, path: str, numa: int) -> Path:
    device = root / "devices" / path
    put(device / "numa_node", str(numa))
    link = root / "bus/pci/devices" / device.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(device)
    return device


def nic(
    root: Path, name: str, pci_path: str, numa: int = 0, state: str = "4: ACTIVE", gids: tuple = (LOCAL, V4)
) -> Path:
    """A RoCE device with one port; its interface is `name` with "mlx5_" replaced by "eth"."""
    device = pci(root, pci_path, numa)
    folder = device / "infiniband" / name
    put(folder / "node_type", "1: CA")
    (folder / "device").symlink_to(device)
    link = root / "class/infiniband" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(folder)
    netdev = name.replace("mlx5_", "eth")
    put(root / "class/net" / netdev / "mtu", "4200")
    port = folder / "ports/1"
    put(port / "state", state)
    put(port / "phys_state", "5: LinkUp" if "ACTIVE" in state else "3: Disabled")
    put(port / "rate", "400 Gb/sec (4X NDR)")
    put(port / "link_layer", "Ethernet")
    for index, gid in enumerate(gids):
        put(port / f"gids/{index}", gid)
        put(port / f"gid_attrs/types/{index}", "RoCE v2")
        put(port / f"gid_attrs/ndevs/{index}", netdev)
    return port


def gpu(root: Path, path: str, ordinal: int, numa: int = 0) -> dict:
    return {"ordinal": ordinal, "pci": pci(root, path, numa).name}


def test_ports_with_interfaces_and_gids(tmp_path: Path) -> None:
    nic(tmp_path, "mlx5_3", "pci0000:10/0000:10:01.0/0000:11:00.0", numa=1)
    (found,) = doctor_rdma.list_nics(tmp_path)
    assert (found["device"], found["port"], found["netdev"], found["numa_node"]) == ("mlx5_3", "1", "eth3", 1)
    assert (found["state"], found["rate"], found["mtu"], found["pci"]) == (
        "ACTIVE", "400 Gb/sec (4X NDR)", 4096, "0000:11:00.0"
    )  # fmt: skip
    assert [(gid["index"], gid["gid"], gid["type"]) for gid in found["gids"]] == [
        (0, "fe80::e42:a1ff:fe5f:a00", "RoCE v2"),
        (1, "::ffff:10.0.0.1", "RoCE v2"),
    ]
    assert found["usable"] and found["trouble"] is None
    text = "\n".join(doctor_rdma.nic_lines([found]))
    assert "mlx5_3 port 1 ==> eth3: ACTIVE" in text
    assert "GID 0: fe80::e42:a1ff:fe5f:a00, RoCE v2, link-local, eth3" in text
    assert doctor_rdma.list_nics(tmp_path / "nothing") == []


def test_each_gpu_has_its_nic_and_the_reason_is_told(tmp_path: Path) -> None:
    for i in range(2):
        nic(tmp_path, f"mlx5_{i}", f"pci0000:{i}0/0000:{i}0:01.0/0000:{i}1:00.0/0000:{i}2:00.0/0000:{i}3:00.0", numa=i)
    gpus = [
        gpu(tmp_path, f"pci0000:{i}0/0000:{i}0:01.0/0000:{i}1:00.0/0000:{i}2:01.0/0000:{i}4:00.0", i, numa=i)
        for i in range(2)
    ]
    told = doctor_rdma.report(tmp_path, gpus, "")
    host, first, second = told["chosen"]
    assert [one["device"] for one in host["nics"]] == ["mlx5_0", "mlx5_1"]
    assert [one["device"] for one in first["nics"]] == ["mlx5_0"]
    assert [(one["device"], one["distance"], one["rail"]) for one in second["nics"]] == [
        ("mlx5_1", "same PCIe switch", 1)
    ]
    text = "\n".join(doctor_rdma.choice_lines(told))
    assert "GPU 1: mlx5_1 port 1 (same PCIe switch, 400 Gb/sec (4X NDR)), rail 1, GID 1 ::ffff:10.0.0.1 RoCE v2" in text
    assert "not mlx5_0 port 1: further away than another" in text


def test_a_dead_port_an_empty_table_and_a_wrong_option(tmp_path: Path) -> None:
    nic(tmp_path, "mlx5_0", "pci0000:10/0000:10:01.0/0000:11:00.0", state="1: DOWN")
    nic(tmp_path, "mlx5_1", "pci0000:20/0000:20:01.0/0000:21:00.0", gids=())
    nics = doctor_rdma.list_nics(tmp_path)
    text = "\n".join(doctor_rdma.nic_lines(nics))
    assert "NO  mlx5_0 port 1: port is down (DOWN, Disabled): ip link set eth0 up" in text
    assert "NO  mlx5_1 port 1: its GID table is empty: give its network interface an address" in text
    told = "\n".join(doctor_rdma.choice_lines(doctor_rdma.report(tmp_path, [], "")))
    assert "host memory: no port serves" in told
    assert "port is down" in told
    wrong = doctor_rdma.report(tmp_path, [], "devices=mlx5_9")["chosen"][0]
    assert 'there is no port "mlx5_9" here; this machine has mlx5_0, mlx5_1' in wrong["error"]
    with pytest.raises(_core.InvalidError, match="rdma option gid=x"):
        _core.rdma_choice("gid=x", "", str(tmp_path))


def test_the_whole_report_on_a_machine_with_rdma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nic(tmp_path, "mlx5_0", "pci0000:10/0000:10:01.0/0000:11:00.0", state="1: DOWN")
    monkeypatch.setattr(doctor, "_SYSFS", tmp_path)
    monkeypatch.setenv("PDXFER_RDMA", "tc=106")
    found = doctor.report()
    assert found["rdma"]["options"] == "tc=106"
    row = next(row for row in found["peers"] if row["peer"] == "other machine, host memory")
    assert row["transport"] == "tcp"
    assert "mlx5_0 port 1: port is down (DOWN, Disabled)" in row["better"]
    text = doctor.render(found)
    assert "RDMA: what would be used" in text
    assert next(row for row in found["limits"] if row["name"] == "memlock")["ok"] is not None


def test_memlock() -> None:
    low = doctor_rdma.judge_memlock(64 << 10, False, True)
    assert low["ok"] is False
    assert "memlock is 64 KiB" in low["detail"] and "ulimit -l unlimited" in low["detail"]
    assert doctor_rdma.judge_memlock(64 << 10, True, True)["ok"] is True
    assert doctor_rdma.judge_memlock(resource.RLIM_INFINITY, False, True)["value"] == "unlimited"
    assert doctor_rdma.judge_memlock(64 << 10, False, False)["ok"] is None


def test_the_capability_is_read_from_proc(tmp_path: Path) -> None:
    put(tmp_path / "self/status", "Name:\tx\nCapEff:\t0000000000004000")
    assert doctor_rdma.may_pin_anything(tmp_path)
    put(tmp_path / "self/status", "Name:\tx\nCapEff:\t0000000000003fff")
    assert not doctor_rdma.may_pin_anything(tmp_path)
    assert not doctor_rdma.may_pin_anything(tmp_path / "none")
    assert isinstance(doctor_rdma.may_pin_anything(Path("/proc")), bool)


def test_gpudirect(tmp_path: Path) -> None:
    def rows(release: str, verbs: str) -> dict:
        return {row["name"]: row for row in doctor_rdma.judge_gpudirect(tmp_path, release, verbs)}

    new = rows("6.8.0-45-generic", "1.14.50.0")
    assert (new["dma-buf"]["ok"], new["peermem"]["ok"]) == (True, None)
    old = rows("5.4.0", "1.14.50.0")
    assert old["dma-buf"]["ok"] is False and "5.12" in old["dma-buf"]["detail"]
    assert old["peermem"]["ok"] is False
    assert "peermem not loaded: modprobe nvidia_peermem" in old["peermem"]["detail"]
    assert rows("6.8.0", "1.8.28.0")["dma-buf"]["ok"] is False
    assert rows("6.8.0", "")["dma-buf"]["ok"] is False
    os.makedirs(tmp_path / "module/nvidia_peermem")
    assert rows("5.4.0", "")["peermem"]["value"] == "nvidia_peermem"
