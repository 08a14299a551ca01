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
_RESTORE = [  # what the kernel forgets when an interface goes down
    f"ip route replace {FAR} dev veth0 src {NEAR} table 100",
    f"ip route replace {NEAR} dev veth1 src {FAR} table 101",
    f"ip neigh replace {FAR} lladdr 02:00:00:00:00:02 dev veth0 nud permanent",
    f"ip neigh replace {NEAR} lladdr 02:00:00:00:00:01 dev veth1 nud permanent",
]


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
    """The wire between rxe0 and rxe1. `restore` puts everything back, whatever was done."""

    def down(self) -> None:
        shell("ip link set veth1 down")

    def up(self) -> None:
        shell("ip link set veth1 up; ip link set veth0 up; " + "; ".join(_RESTORE))

    def netem(self, what: str) -> None:
        """For example "loss 100%", "delay 2ms", "loss 1%": of packets from rxe0 to rxe1 and back."""
        shell("; ".join(f"tc qdisc replace dev {veth} root netem {what}" for veth in ("veth0", "veth1")))

    def clear(self) -> None:
        shell("tc qdisc del dev veth0 root 2>/dev/null; tc qdisc del dev veth1 root 2>/dev/null", check=False)

    def remove_device(self, name: str) -> None:
        shell(f"rdma link delete {name}")

    def restore(self) -> None:
        self.clear()
        self.up()
        present = shell("rdma link")
        for number in (0, 1):
            if f"rxe{number}/" not in present:
                shell(f"rdma link add rxe{number} type rxe netdev veth{number}")


def resources() -> dict[str, int]:
    """QPs, CQs, PDs and MRs that exist on both devices together; what user programs hold, not the kernel's own."""
    count: Counter[str] = Counter()
    for kind in ("qp", "cq", "pd", "mr"):
        entries = json.loads(shell(f"rdma -j resource show {kind}") or "[]")
        count[kind] = sum("pid" in entry for entry in entries)
    return dict(count)


def packets() -> dict[str, int]:
    """Packets that each device sent, of which a transfer over RDMA cannot have none."""
    sent = {}
    for device in ("rxe0", "rxe1"):
        folder = Path(f"/sys/class/infiniband/{device}/ports/1/hw_counters")
        sent[device] = int((folder / "sent_pkts").read_text())
    return sent


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
