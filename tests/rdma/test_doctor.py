"""`pdxfer doctor --listen` and `--connect` over real verbs: every port of one process with every port of another.

The two devices of the bed make four pairs. Those from a device to itself never leave it, so a link that loses every
packet cuts just the other two: the matrix shows which, and says why in words.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from bed import Link, packets

DOCTOR = [sys.executable, "-m", "pdxfer.cli", "doctor"]
PATIENCE = 240  # of a whole matrix on one busy CPU
PORTS = ("rxe0:1", "rxe1:1")
CROSSING = {("rxe0:1", "rxe1:1"), ("rxe1:1", "rxe0:1")}


@pytest.fixture
def there() -> Iterator[str]:
    """HOST:PORT of a listening doctor. On loopback: its questions must get through when the link is cut."""
    server = subprocess.Popen(
        [*DOCTOR, "--listen", "127.0.0.1:0", "--secret", "bed", "--wait", "300"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        found = re.search(r"port (\d+)", server.stderr.readline())
        assert found, "the doctor does not listen"
        yield f"127.0.0.1:{found[1]}"
    finally:
        server.kill()
        server.communicate()


def ask(there: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [*DOCTOR, "--connect", there, "--secret", "bed", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def pairs_of(done: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads(done.stdout)["pairs"]
    assert (rows[0]["transport"], rows[0]["error"]) == ("tcp", None), done.stdout
    return {(row["local"], row["remote"]): row for row in rows if row["transport"] == "rdma"}


@pytest.mark.timeout(2 * PATIENCE + 60)
def test_every_pair_works_and_really_crosses(there: str) -> None:
    before = packets()
    done = ask(there, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    pairs = pairs_of(done)
    assert set(pairs) == {(a, b) for a in PORTS for b in PORTS}
    for (local, remote), row in pairs.items():
        assert row["error"] is None and row["gb_per_s"] > 0
        assert f"{local.removesuffix(':1')} port 1 to {remote.removesuffix(':1')} port 1" in row["path"]
        assert "RoCE v2" in row["path"] and "0 failures" in row["path"]
    sent = {device: count - before[device] for device, count in packets().items()}
    assert all(count > 10_000 for count in sent.values()), sent  # 64 MiB a pass, 4 KiB a packet


@pytest.mark.timeout(2 * PATIENCE + 60)
def test_a_cut_link_is_found_and_said_in_words(there: str, link: Link) -> None:
    link.netem("loss 100%")
    done = ask(there, "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    pairs = pairs_of(done)
    assert {pair for pair, row in pairs.items() if row["error"] is not None} == CROSSING
    for pair in CROSSING:
        assert pairs[pair]["gb_per_s"] is None
        for words in ("rdma: no packet came through", f"{pair[0][:4]} port 1 to {pair[1][:4]} port 1", "same subnet"):
            assert words in pairs[pair]["error"]
    table = ask(there).stdout
    assert re.search(r"^rxe0:1 +[0-9.]+ +FAILED$", table, re.M) and re.search(r"^rxe1:1 +FAILED +[0-9.]+$", table, re.M)
    assert "rdma rxe0:1 to rxe1:1: " in table

    link.restore()  # and found well again, by the same listening doctor
    assert ask(there).returncode == 0
