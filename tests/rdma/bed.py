"""The test bed as its tests use it: the link between the two soft-RoCE devices, and what the kernel counts.

Runs inside the kernel that `tests/rdma/run` starts, as root, in the process of pytest. Every command has a bound.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pdxfer

NEAR, FAR = "10.77.0.1", "10.77.0.2"  # rxe0 on veth0, rxe1 on veth1


def require() -> None:
    """Raises RuntimeError outside the bed: these tests break links and would break those of the machine."""
    if os.environ.get("RDMA_BED") is None or not Path("/sys/class/infiniband/rxe1").exists():
        raise RuntimeError("these tests run in the RDMA test bed only: tests/rdma/run")


def shell(command: str, check: bool = True) -> str:
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20)
    if check and done.returncode != 0:
        raise RuntimeError(f"{command}: {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Link:
    """The wire between two soft-RoCE devices; `restore` puts everything back, whatever was done.

    Number 0 is there from the start: rxe0 on veth0, rxe1 on veth1, 10.77.0.1 and 10.77.0.2. Number 1, made with `add`
    and taken away with `remove`, lies beside it: rxe2 and rxe3, veth2 and veth3, 10.78.0.1 and 10.78.0.2.
    """

    def __init__(self, number: int = 0) -> None:
        self.ends = (2 * number, 2 * number + 1)
        self.devices = [f"rxe{end}" for end in self.ends]
        self._veths = [f"veth{end}" for end in self.ends]
        self._addresses = [f"10.{77 + number}.0.{end}" for end in (1, 2)]

    def _each(self) -> list[tuple[int, str, str, str]]:
        """Routing table, interface, address and the other end's address of each end."""
        tables = [100 + end for end in self.ends]
        return list(zip(tables, self._veths, self._addresses, reversed(self._addresses), strict=True))

    def add(self) -> None:
        """As guest/network does for the first one: policy routing lets packets cross the pair, not loopback."""
        (near, far), (here, there) = self._veths, self._addresses
        mine, other = (f"mtu 4200 address 02:00:00:00:00:{end + 1:02x}" for end in self.ends)
        shell(
            f"ip link add {near} {mine} type veth peer name {far} {other} &&"
            f"ip addr add {here}/24 dev {near} && ip addr add {there}/24 dev {far}"
        )
        for table, veth, mine, other in self._each():
            shell(
                f"cd /proc/sys/net/ipv4/conf/{veth} && echo 1 >accept_local && echo 0 >rp_filter &&"
                f"ip link set {veth} txqueuelen 20000 up && ip rule add pref 10 dev {veth} lookup local &&"
                f"ip rule add pref 20 oif {veth} to {other} lookup {table} &&"
                f"ip rule add pref 22 from {mine} to {other} lookup {table}"
            )
        self.restore()

    def remove(self) -> None:
        for device in self.devices:
            self.remove_device(device)
        for table, veth, _, _ in self._each():
            shell(f"ip rule del dev {veth} lookup local; while ip rule del lookup {table} 2>/dev/null; do :; done")
        shell(f"ip link del {self._veths[0]}")

    def down(self) -> None:
        shell(f"ip link set {self._veths[1]} down")

    def up(self) -> None:
        """Also what the kernel forgot when the interface went down: its routes and neighbours."""
        near, far = self._veths
        shell(f"ip link set {far} up; ip link set {near} up")
        for (table, veth, mine, other), end in zip(self._each(), reversed(self.ends), strict=True):
            shell(
                f"ip route replace {other} dev {veth} src {mine} table {table} &&"
                f"ip neigh replace {other} lladdr 02:00:00:00:00:{end + 1:02x} dev {veth} nud permanent"
            )

    def netem(self, what: str) -> None:
        """For example "loss 100%", "delay 2ms", "loss 1%": of packets both ways."""
        shell("; ".join(f"tc qdisc replace dev {veth} root netem {what}" for veth in self._veths))

    def clear(self) -> None:
        shell("; ".join(f"tc qdisc del dev {veth} root 2>/dev/null" for veth in self._veths), check=False)

    def remove_device(self, name: str) -> None:
        shell(f"rdma link delete {name}")

    def restore(self) -> None:
        self.clear()
        self.up()
        present = shell("rdma link")
        for device, veth in zip(self.devices, self._veths, strict=True):
            if f"{device}/" not in present:
                shell(f"rdma link add {device} type rxe netdev {veth}")


def resources() -> dict[str, int]:
    """QPs, CQs, PDs and MRs that exist on both devices together; what user programs hold, not the kernel's own."""
    count: Counter[str] = Counter()
    for kind in ("qp", "cq", "pd", "mr"):
        entries = json.loads(shell(f"rdma -j resource show {kind}") or "[]")
        count[kind] = sum("pid" in entry for entry in entries)
    return dict(count)


def packets() -> dict[str, int]:
    """Packets that each device sent, of which a transfer over RDMA cannot have none."""
    devices = sorted(Path("/sys/class/infiniband").iterdir())
    return {device.name: int((device / "ports/1/hw_counters/sent_pkts").read_text()) for device in devices}


def record(test: str, facts: dict[str, Any]) -> None:
    """Adds what a test found to $RDMA_BED_SCRATCH/faults.json, with what is needed to find it again."""
    path = Path(os.environ["RDMA_BED_SCRATCH"]) / "faults.json"
    told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"tests": {}}
    cpu = Path("/proc/cpuinfo").read_text().split("model name", 1)[-1].split("\n", 1)[0].strip(" \t:")
    commit = shell("git rev-parse HEAD && git status --porcelain -uno | sed 's/^/changed:/'", check=False)
    told["machine"] = f"RDMA test bed: user-mode Linux {platform.release()}, 1 CPU of an {cpu}, soft-RoCE"
    told["versions"] = {"pdxfer": pdxfer.__version__, "python": platform.python_version()}
    told["commit"] = " ".join(commit.split())
    told["tests"][test] = facts
    path.write_text(json.dumps(told, indent=1) + "\n")
