"""``pdxfer doctor``: what this machine has, which transport each kind of peer would use, and what stands in the way.

The report (``pdxfer doctor --json``, or :func:`report`) is one JSON object; every key is always there:

- ``schema``: 1.
- ``pdxfer``: ``version``, ``compiler``, ``glibc``, ``assertions``, ``device_code`` (``present``, ``compiler``,
  ``version``, ``archs``, ``ptx_arch``, ``ptx_version``, ``bytes``, ``reason`` when absent), ``settings`` (the names of
  ``PDXFER_*`` variables that are set; values are left out, one may be a secret).
- ``transports``: list of ``name``, ``summary``, ``automatic`` (part of "auto"), in order of preference.
- ``python``: ``version``, ``executable``.
- ``kernel``: ``release``, ``machine``, ``cpus``, ``memory_bytes``, ``numa_nodes``.
- ``gpus``: ``driver_version`` (the newest CUDA that the driver serves), ``library``, ``reason``, ``devices`` (list of
  ``ordinal``, ``name``, ``capability``, ``bytes``, ``multiprocessors``, ``pci``, ``numa_node``, ``peers``, ``image``).
- ``nics``: list of ``device``, ``port``, ``state``, ``rate``, ``link_layer``, ``netdev``, ``numa_node``, ``pci``,
  ``mtu``, ``gids`` (``index``, ``gid``, ``type``, ``netdev``, ``link_local``), ``trouble`` (null: none), ``usable``.
- ``rdma``: ``options`` (the setting), ``chosen`` (list of ``place``, ``nics``, ``refused``, ``error``): which ports
  host memory and each GPU would use, and why not the others.
- ``limits``: list of ``name``, ``value``, ``ok`` (true, false, or null for a bare fact), ``detail``.
- ``libraries``: ``cuda``, ``ibverbs``, ``nccl``, each ``present``, ``path``, ``version``, ``already_loaded``,
  ``reason``.
- ``container``: ``hints`` (list of text), ``network_namespace``, ``pid_namespace``.
- ``peers``: list of ``peer`` (kind of peer), ``transport`` (null: none), ``path``, ``better`` (what would be faster and
  why it is not used; null when there is nothing better), ``next_step`` (null when there is nothing to do).

``pdxfer doctor --listen`` on one machine and ``--connect HOST:PORT`` on another test what reaches what: `doctor_reach`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pdxfer import _core, doctor_rdma

Facts = dict[str, Any]

_SYSFS = Path("/sys")
_PROC = Path("/proc")


def main(argv: Sequence[str]) -> int:
    """Print the report, or with ``--connect`` the matrix of ports; ``--json``: as one JSON object on stdout.

    Returns:
        0; with ``--connect`` 1 when a pair failed and 2 when the other end cannot be reached.
    """
    parser = argparse.ArgumentParser(prog="pdxfer doctor", description="What this machine has, and what would be used.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--listen", nargs="?", const=":4790", metavar="[HOST]:PORT", help="answer doctors of other machines (:4790)"
    )
    where.add_argument("--connect", metavar="HOST:PORT", help="measure every pair of ports to a listening doctor")
    parser.add_argument("--secret", default="", help="shared secret, the same on both ends (or PDXFER_SECRET)")
    parser.add_argument("--wait", type=float, default=600.0, help="seconds that --listen waits for a visitor (600)")
    args = parser.parse_args(list(argv))
    if args.listen is not None or args.connect is not None:
        from pdxfer import doctor_reach  # brings in NumPy, which the report does not need

        return doctor_reach.run_connect(args) if args.connect is not None else doctor_reach.run_listen(args)
    found = report()
    print(json.dumps(found, indent=2) if args.json else render(found))
    return 0


def report() -> Facts:
    """All facts and judgements about this machine; see the module's text for its keys. Missing files are facts too."""
    probes = _core.probe_kernel()  # first: once the CUDA driver is up, private memory counts as possibly pinned
    cuda, verbs, nccl = _core.cuda_info(), _core.verbs_info(), _core.nccl_info(_nccl_wheel_file())
    found: Facts = {
        "schema": 1,
        "pdxfer": {**_core.build_info(), "device_code": _core.device_code(), "settings": _settings()},
        "transports": _core.transports(),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "kernel": _kernel(),
        "gpus": _gpus(cuda),
        "nics": doctor_rdma.list_nics(_SYSFS),
        "rdma": doctor_rdma.report(_SYSFS, cuda["devices"], _rdma_options()),
        "limits": _limits(probes),
        "libraries": {
            "cuda": _library(cuda, _cuda_version(cuda["driver_version"])),
            "ibverbs": _library(verbs, _version_in(verbs["path"])),
            "nccl": _library(nccl, _nccl_version(nccl["version"])),
        },
        "container": _container(_PROC),
    }
    if found["nics"] and cuda["devices"]:
        found["limits"] += doctor_rdma.judge_gpudirect(
            _SYSFS, platform.release(), found["libraries"]["ibverbs"]["version"]
        )
    found["peers"] = judge(found, probes)
    return found


def read_text(path: Path) -> str:
    """The stripped text of a small file, or "" when it cannot be read: each is absent on one kernel or another."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _rdma_options() -> str:
    try:
        return dict(_core.Config(environment=True).items())["rdma"]
    except _core.InvalidError:  # some setting is wrong: the engine will say which; facts are told without it
        return ""


def _settings() -> list[str]:
    return sorted(name for name in os.environ if name.startswith("PDXFER_"))


def _kernel() -> Facts:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    nodes = list((_SYSFS / "devices/system/node").glob("node[0-9]*"))
    return {
        "release": platform.release(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": pages * page,
        "numa_nodes": max(len(nodes), 1),
    }


def _gpus(cuda: Facts) -> Facts:
    devices = [
        {**device, "numa_node": _numa_node(_SYSFS / "bus/pci/devices" / device["pci"])} for device in cuda["devices"]
    ]
    version = _cuda_version(cuda["driver_version"])
    return {"driver_version": version, "library": cuda["path"], "reason": cuda["reason"], "devices": devices}


def _numa_node(device: Path) -> int | None:
    text = read_text(device / "numa_node")
    return int(text) if text.isdigit() else None  # -1: the firmware did not say


def _limits(probes: Facts) -> list[Facts]:
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    nofile = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    has_nic = bool(doctor_rdma.list_nics(_SYSFS))
    yama = read_text(_PROC / "sys/kernel/yama/ptrace_scope")
    yama_text = {
        "": "the kernel has no Yama",
        "0": "processes of one user may write each other's memory",
        "1": "only with the target's consent",
        "2": "only with CAP_SYS_PTRACE",
        "3": "never",
    }
    uffd = read_text(_PROC / "sys/vm/unprivileged_userfaultfd")
    rows: list[Facts] = [
        doctor_rdma.judge_memlock(memlock, doctor_rdma.may_pin_anything(_PROC), has_nic),
        _limit("nofile", str(nofile), nofile >= 1024, "a tcp peer uses one descriptor per stream, and a few"),
        _limit("yama ptrace_scope", yama or "absent", None, yama_text.get(yama, "unknown value")),
        _limit("unprivileged_userfaultfd", uffd or "absent", None, "0: user-mode faults only, which is enough"),
    ]
    try:
        shm = os.statvfs("/dev/shm")
        total, free = shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize
        rows.append(_limit("/dev/shm", f"{_size(free)} free of {_size(total)}", None, "memfds are not bound by it"))
    except OSError as error:
        rows.append(_limit("/dev/shm", "absent", None, str(error)))
    for name, probe in probes.items():
        rows.append(_limit(name, "works" if probe["works"] else "does not work", probe["works"], probe["detail"]))
    return rows


def _limit(name: str, value: str, ok: bool | None, detail: str) -> Facts:
    return {"name": name, "value": value, "ok": ok, "detail": detail}


def _library(info: Facts, version: str) -> Facts:
    return {
        "present": info["present"],
        "path": info["path"],
        "version": version,
        "already_loaded": info["already_loaded"],
        "reason": info["reason"],
    }


def _version_in(path: str) -> str:
    # libibverbs.so.1.14.48.0: the file name is the only place where the library says its version.
    return Path(path).name.partition(".so.")[2]


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


def _nccl_version(number: int) -> str:
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number else ""


def _nccl_wheel_file() -> str:
    # The folder nvidia/ is shared by many wheels: a namespace package with several places.
    try:
        spec = importlib.util.find_spec("nvidia")
    except (ImportError, ValueError):
        spec = None
    for place in (spec.submodule_search_locations or []) if spec else []:
        file = Path(place) / "nccl/lib/libnccl.so.2"
        if file.is_file():
            return str(file)
    return ""


def _container(proc: Path) -> Facts:
    hints = []
    if Path("/.dockerenv").exists():
        hints.append("Docker (/.dockerenv)")
    if Path("/run/.containerenv").exists():
        hints.append("Podman (/run/.containerenv)")
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        hints.append("Kubernetes (KUBERNETES_SERVICE_HOST)")
    cgroup = read_text(proc / "1/cgroup")
    hints += [f"{word} in /proc/1/cgroup" for word in ("docker", "kubepods", "lxc", "containerd") if word in cgroup]
    if "microsoft" in platform.release().lower():
        hints.append("WSL")
    return {
        "hints": hints,
        "network_namespace": _link(proc / "self/ns/net"),
        "pid_namespace": _link(proc / "self/ns/pid"),
    }


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def judge(found: Facts, probes: Facts) -> list[Facts]:
    """Which transport each kind of peer would use, why not the better one, and the next step; from facts alone."""
    return [_judge_same_machine(probes), _judge_other_machine(found), *_judge_gpu(found)]


def _peer(peer: str, transport: str | None, path: str, better: str | None, next_step: str | None) -> Facts:
    return {"peer": peer, "transport": transport, "path": path, "better": better, "next_step": next_step}


def _judge_same_machine(probes: Facts) -> Facts:
    kind = "same machine, host memory"
    adopt, cma = probes["adopt"], probes["process_vm_writev"]
    if adopt["works"]:
        return _peer(kind, "shm", "the peer's memory is mapped; one copy", None, None)
    better = f"mapping the peer's memory (one copy, no system call) is not possible: {adopt['detail']}"
    if not probes["memfd"]["works"]:
        step = f"allow memfd_create: {probes['memfd']['detail']}"
    elif not probes["userfaultfd"]["works"]:
        step = (
            "allow userfaultfd in the container's seccomp profile, or set PDXFER_SHM_PATH=map when nobody writes then"
        )
    else:
        step = "see docs/gotchas.md, Memory that cannot be shared in place"
    if cma["works"]:
        return _peer(kind, "shm", "process_vm_writev; one copy", better, step)
    better += f"; writing into the peer's memory is not either: {cma['detail']}"
    step = f"give containers --cap-add SYS_PTRACE and one pid namespace, or sysctl kernel.yama.ptrace_scope=0; {step}"
    return _peer(kind, "shm", "a shared staging ring; two copies", better, step)


def has_transport(found: Facts, name: str) -> bool:
    """Is this transport part of this build?"""
    return any(transport["name"] == name for transport in found["transports"])


def _judge_other_machine(found: Facts) -> Facts:
    kind = "other machine, host memory"
    path = "packed streams, several connections per peer"
    nics = found["nics"]
    if not nics:
        return _peer(kind, "tcp", path, "RDMA: there is no RDMA NIC (/sys/class/infiniband is empty or absent)", None)
    usable = [nic for nic in nics if nic["usable"]]
    if not usable:
        why = "; ".join(nic["trouble"] for nic in nics)
        return _peer(kind, "tcp", path, f"RDMA: no port can be used: {why}", "see the first port's line")
    if not found["libraries"]["ibverbs"]["present"]:
        step = "install rdma-core (Debian and Ubuntu: apt-get install libibverbs1 ibverbs-providers)"
        return _peer(kind, "tcp", path, f"RDMA: {found['libraries']['ibverbs']['reason']}", step)
    if not has_transport(found, "rdma"):
        return _peer(kind, "tcp", path, "RDMA: this version of pdxfer has no rdma transport yet", None)
    return _peer(kind, "rdma", "the NIC writes into the peer's memory", None, None)


def _judge_gpu(found: Facts) -> list[Facts]:
    same = _judge_one_gpu(found, "same machine, GPU memory", "cuda_ipc", "the peer's memory is mapped; one kernel")
    kind = "other machine, GPU memory"
    host = _judge_other_machine(found)
    if host["transport"] == "rdma":
        return [same, _judge_one_gpu(found, kind, "rdma", "the NIC reads and writes GPU memory")]
    row = _judge_one_gpu(found, kind, "tcp", "kernels gather and scatter through pinned memory; streams between")
    return [
        same,
        row if row["transport"] is None else {**row, "better": host["better"], "next_step": host["next_step"]},
    ]


def _judge_one_gpu(found: Facts, kind: str, transport: str, path: str) -> Facts:
    gpus, code = found["gpus"], found["pdxfer"]["device_code"]
    if not gpus["devices"]:
        reason = f"there is no GPU that this process can use: {gpus['reason'] or 'none listed'}"
        return _peer(kind, None, "not available", reason, None)
    if not code["present"]:
        better = f"{transport}: this build has no device code: {code['reason']}"
        return _peer(kind, None, "not available", better, "rebuild with a CUDA compiler: docs/gotchas.md, Device code")
    if not has_transport(found, transport):
        better = f"{transport}: this version of pdxfer moves host memory only"
        return _peer(kind, None, "not available", better, "keep the KV cache that is to be moved in host memory")
    if any(not device["image"] for device in gpus["devices"]):
        return _peer(kind, None, "not available", f"{transport}: a GPU here is older than compute capability 8.0", None)
    return _peer(kind, transport, path, None, None)


def render(found: Facts) -> str:
    """The report as text for a terminal, at most about 120 columns where names allow."""
    me, code, kernel = found["pdxfer"], found["pdxfer"]["device_code"], found["kernel"]
    if code["present"]:
        archs = " ".join(f"sm_{arch}" for arch in code["archs"])
        device = f"{archs}, PTX {code['ptx_version']} for compute_{code['ptx_arch']}"
        device += f"; by {code['compiler']} {code['version']}"
    else:
        device = f"none: {code['reason']}"
    lines = [f"pdxfer {me['version']}"]
    lines += _rows(
        [
            ("build", f"{me['compiler']}, glibc {me['glibc']}" + (", with assertions" if me["assertions"] else "")),
            ("device code", device),
            ("transports", ", ".join(one["name"] for one in found["transports"])),
            ("settings", ", ".join(me["settings"]) or "no PDXFER_* variable is set"),
            ("Python", f"{found['python']['version']} ({found['python']['executable']})"),
            ("kernel", f"Linux {kernel['release']} {kernel['machine']}, {kernel['cpus']} CPUs, "
                       f"{_size(kernel['memory_bytes'])}, {kernel['numa_nodes']} NUMA node(s)"),
            ("container", "; ".join(found["container"]["hints"]) or "no sign of one"),
        ]
    )  # fmt: skip
    lines += ["", "GPUs", *_gpu_lines(found["gpus"])]
    lines += ["", "RDMA NICs", *doctor_rdma.nic_lines(found["nics"])]
    lines += ["", "RDMA: what would be used", *doctor_rdma.choice_lines(found["rdma"])] if found["nics"] else []
    marks = {True: "ok  ", False: "NO  ", None: "    "}
    lines += ["", "Kernel and limits"]
    lines += _rows([(row["name"], f"{marks[row['ok']]}{row['value']}: {row['detail']}") for row in found["limits"]])
    lines += ["", "Libraries"]
    lines += _rows([(name, _library_line(info)) for name, info in found["libraries"].items()])
    lines += ["", "Peers"]
    for row in found["peers"]:
        lines.append(f"  {row['peer']}: {row['transport'] or 'none'} ({row['path']})")
        lines += [f"    not better: {row['better']}"] if row["better"] else []
        lines += [f"    next step:  {row['next_step']}"] if row["next_step"] else []
    return "\n".join(lines)


def _gpu_lines(gpus: Facts) -> list[str]:
    if not gpus["devices"]:
        return [f"  none: {gpus['reason'] or 'the driver lists no device'}"]
    lines = [f"  driver for CUDA {gpus['driver_version']} ({gpus['library']})"]
    for device in gpus["devices"]:
        peers = ", ".join(str(peer) for peer in device["peers"]) or "no other"
        node = "" if device["numa_node"] is None else f", NUMA node {device['numa_node']}"
        lines.append(
            f"  {device['ordinal']}: {device['name']}, {_size(device['bytes'])}, compute {device['capability']}, "
            f"{device['pci']}{node}; maps memory of: {peers}; runs {device['image'] or 'no image of this build'}"
        )
    return lines


def _library_line(info: Facts) -> str:
    if not info["present"]:
        return f"not found: {info['reason']}"
    loaded = ", already in this process" if info["already_loaded"] else ""
    trouble = f"; {info['reason']}" if info["reason"] else ""
    return f"{info['version'] or 'version unknown'} ({info['path']}{loaded}){trouble}"


def _rows(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
