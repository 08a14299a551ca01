"""What ``pdxfer doctor`` says about RDMA: which ports would be used and why not others, pinned memory, GPUDirect.

Facts come from the native core, which asks the same functions as the transport; this module judges and prints them.
Every obstacle names its next step. Called by `doctor` on the caller's thread; the roots are parameters for tests.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

from pdxfer import _core

Facts = dict[str, Any]
SYSFS = Path("/sys")

_CAP_IPC_LOCK = 14
_DMABUF_KERNEL = (5, 12)  # ib_core imports dma-bufs since
_DMABUF_VERBS = 34  # rdma-core with ibv_reg_dmabuf_mr


def report(sysfs: Path, gpus: list[Facts], options: str) -> Facts:
    """``chosen``: list of ``place``, ``nics``, ``refused``, ``error``; one for host memory and one per GPU."""
    places = [("host memory", "")] + [(f"GPU {gpu['ordinal']}", gpu["pci"]) for gpu in gpus]
    return {"options": options, "chosen": [_chosen(place, pci, options, sysfs) for place, pci in places]}


def _chosen(place: str, pci: str, options: str, sysfs: Path) -> Facts:
    try:
        choice = _core.rdma_choice(options, pci, str(sysfs))
    except _core.PdxferError as error:
        return {"place": place, "nics": [], "refused": [], "error": str(error)}
    return {"place": place, **choice, "error": None}


def list_nics(sysfs: Path) -> list[Facts]:
    """Every port of every RDMA device under ``sysfs``/class/infiniband; empty when there are none."""
    return [
        {
            "device": device["device"],
            "port": str(port["port"]),
            "state": port["state"] or "unknown",
            "rate": port["rate"] or "unknown",
            "link_layer": port["link_layer"],
            "netdev": ", ".join(port["netdevs"]),
            "numa_node": device["numa_node"] if device["numa_node"] >= 0 else None,
            "pci": device["pci"],
            "mtu": port["mtu"],
            "gids": port["gids"],
            "trouble": port["trouble"] or None,
            "usable": not port["trouble"],
        }
        for device in _core.rdma_devices(str(sysfs))
        for port in device["ports"]
    ]


def may_pin_anything(proc: Path) -> bool:
    """Has this process CAP_IPC_LOCK, which no memlock limit binds?"""
    status = proc / "self/status"
    text = status.read_text() if status.is_file() else ""
    caps = [line.split()[1] for line in text.splitlines() if line.startswith("CapEff:")]
    return bool(caps) and bool(int(caps[0], 16) >> _CAP_IPC_LOCK & 1)


def judge_memlock(limit: int, privileged: bool, has_nic: bool) -> Facts:
    """The row of doctor's limits about pinned memory; ``ok`` is None where there is no NIC to pin it for."""
    unlimited = limit == resource.RLIM_INFINITY
    value = "unlimited" if unlimited else f"{limit // 1024} KiB"
    if not has_nic:
        return {"name": "memlock", "value": value, "ok": None, "detail": "only RDMA pins memory"}
    if unlimited or privileged:
        why = "an RDMA NIC may pin all memory" if unlimited else "not binding: this process has CAP_IPC_LOCK"
        return {"name": "memlock", "value": value, "ok": True, "detail": why}
    detail = (
        f"memlock is {value}, and RDMA pins every registered byte: raise it with ulimit -l unlimited "
        "(systemd: LimitMEMLOCK=infinity; Docker: --ulimit memlock=-1)"
    )
    return {"name": "memlock", "value": value, "ok": False, "detail": detail}


def judge_gpudirect(sysfs: Path, release: str, verbs_version: str) -> list[Facts]:
    """Two rows, ``dma-buf`` and ``peermem``: the two ways in which a NIC reaches GPU memory. ``ok`` None: unknown."""
    kernel = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    package = verbs_version.split(".")
    dmabuf, why = True, "kernel and libibverbs can; the GPU's driver decides (open kernel modules)"
    if kernel < _DMABUF_KERNEL:
        dmabuf, why = False, f"Linux {release} is older than 5.12: use a newer kernel, or peermem"
    elif len(package) < 3 or not package[2].isdigit() or int(package[2]) < _DMABUF_VERBS:
        dmabuf, why = (
            False,
            "libibverbs is missing or older than rdma-core 34: install a newer rdma-core, or use peermem",
        )
    loaded = [name for name in ("nvidia_peermem", "nv_peer_mem") if (sysfs / "module" / name).is_dir()]
    step = "peermem not loaded: modprobe nvidia_peermem (only needed where dma-buf does not work)"
    return [
        {"name": "dma-buf", "value": "possible" if dmabuf else "no", "ok": dmabuf, "detail": why},
        {
            "name": "peermem",
            "value": loaded[0] if loaded else "not loaded",
            "ok": True if loaded else (None if dmabuf else False),
            "detail": "the NIC pins GPU memory through it" if loaded else step,
        },
    ]


def nic_lines(nics: list[Facts]) -> list[str]:
    """Every port, its GIDs, and what stands in its way, for a terminal."""
    if not nics:
        return ["  none (/sys/class/infiniband)"]
    lines = []
    for nic in nics:
        lines.append(
            f"  {nic['device']} port {nic['port']} ==> {nic['netdev'] or 'no network interface'}: {nic['state']}, "
            f"{nic['rate']}, {nic['link_layer']}"
            + (f", MTU {nic['mtu']}" if nic["mtu"] else "")
            + (f", {nic['pci']}" if nic["pci"] else "")
            + ("" if nic["numa_node"] is None else f", NUMA node {nic['numa_node']}")
        )
        lines += [f"    NO  {nic['trouble']}"] if nic["trouble"] else []
        lines += [_gid_line(gid) for gid in nic["gids"]]
    return lines


def _gid_line(gid: Facts) -> str:
    local = ", link-local" if gid["link_local"] else ""
    return f"    GID {gid['index']}: {gid['gid']}, {gid['type']}{local}" + (
        f", {gid['netdev']}" if gid["netdev"] else ""
    )


def choice_lines(rdma: Facts) -> list[str]:
    """Which ports each place would use, and which GID each tells peers first."""
    lines = [f"  options: {rdma['options'] or 'none (PDXFER_RDMA); everything is chosen'}"]
    for one in rdma["chosen"]:
        if one["error"]:
            lines.append(f"  {one['place']}: {one['error']}")
            continue
        if not one["nics"]:
            lines.append(f"  {one['place']}: no port serves")
        for nic in one["nics"]:
            gid = nic["gids"][0]
            lines.append(
                f"  {one['place']}: {nic['device']} port {nic['port']} ({nic['why']}), rail {nic['rail']}, "
                f"GID {gid['index']} {gid['gid']} {gid['type']} unless another reaches the peer better"
            )
        lines += [f"    not {text}" for text in one["refused"]]
    return lines
