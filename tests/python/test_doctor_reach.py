"""doctor --listen and --connect: two processes over loopback; failures in words; hostile requests refused."""

import json
import re
import socket
import subprocess
import sys
import threading

import pytest

import pdxfer
from pdxfer import doctor_reach
from pdxfer.bench.channel import Channel
from pdxfer.bench.errors import BenchError

DOCTOR = [sys.executable, "-m", "pdxfer.cli", "doctor"]


def test_two_processes_over_tcp() -> None:
    server = subprocess.Popen(
        [*DOCTOR, "--listen", "127.0.0.1:0", "--secret", "s", "--wait", "60"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        found = re.search(r"port (\d+)", server.stderr.readline())
        assert found
        there = f"127.0.0.1:{found[1]}"
        run = subprocess.run(
            [*DOCTOR, "--connect", there, "--secret", "s", "--json"], capture_output=True, text=True, timeout=120
        )
        told = json.loads(run.stdout)
        tcp = told["pairs"][0]
        assert (tcp["transport"], tcp["error"]) == ("tcp", None), run.stderr
        assert tcp["gb_per_s"] > 0 and "stream" in tcp["path"]
        assert told["pairs"][1]["transport"] == "rdma"
        wrong = subprocess.run(
            [*DOCTOR, "--connect", there, "--secret", "other"], capture_output=True, text=True, timeout=60
        )
        assert wrong.returncode == 2
        assert "secret" in wrong.stderr
    finally:
        server.kill()
        server.communicate()


def test_nobody_there_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: refused
        run = subprocess.run(
            [*DOCTOR, "--connect", f"127.0.0.1:{taken.getsockname()[1]}"], capture_output=True, text=True, timeout=60
        )
    assert run.returncode == 2
    assert "is `pdxfer doctor --listen` running there?" in run.stderr


@pytest.fixture
def channel():
    ours, theirs = socket.socketpair()
    server = doctor_reach.Server(Channel(theirs, "the asking end"), "", ["fake_0:1"])
    thread = threading.Thread(target=server.serve)
    thread.start()
    client = Channel(ours, "the doctor")
    yield client
    client.close()
    thread.join(20)
    assert not thread.is_alive()
    theirs.close()


def test_requests_that_are_not_offered(channel: Channel) -> None:
    assert channel.call("nics") == {"nics": ["fake_0:1"]}
    for fields in (
        {"transport": "shm", "nic": ""},
        {"transport": "rdma", "nic": "mlx5_7:1,path=direct"},
        {"transport": "tcp"},
        {"transport": "tcp", "nic": "", "more": 1},
    ):
        with pytest.raises(BenchError):
            channel.call("open", **fields)
    with pytest.raises(BenchError, match="nothing is open"):
        channel.call("check")
    with pytest.raises(BenchError, match="is not known to doctor"):
        channel.call("serve")


def test_a_pair_that_fails_is_a_row_and_the_others_go_on(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_reach._core, "transports", lambda: [{"name": "rdma"}])
    monkeypatch.setattr(doctor_reach, "MEASURE_S", 0.01)
    rows = doctor_reach.matrix(channel, "", ["here_0:1", "here_1:1"])
    assert [(row["transport"], row["local"], row["remote"]) for row in rows] == [
        ("tcp", "", ""),
        ("rdma", "here_0:1", "fake_0:1"),
        ("rdma", "here_1:1", "fake_0:1"),
    ]
    assert rows[0]["error"] is None
    assert rows[1]["gb_per_s"] is None and rows[1]["error"]  # there is no such device
    text = doctor_reach.render(rows)
    assert re.search(r"here_1:1 +FAILED", text)
    assert f"rdma here_0:1 to fake_0:1: {rows[1]['error']}" in text


def test_without_rdma_one_row_says_why(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_reach, "MEASURE_S", 0.01)
    monkeypatch.setattr(doctor_reach._core, "transports", lambda: [{"name": "tcp"}])
    assert "has no rdma transport" in doctor_reach.matrix(channel, "", ["here_0:1"])[1]["error"]
    monkeypatch.setattr(doctor_reach._core, "transports", lambda: [{"name": "rdma"}])
    assert "no usable RDMA port on this machine" in doctor_reach.matrix(channel, "", [])[1]["error"]


def test_the_matrix_as_text() -> None:
    def row(a: str, b: str, rate: float | None, error: str | None) -> dict:
        return {"transport": "rdma", "local": a, "remote": b, "gb_per_s": rate, "path": "", "error": error}

    tcp = {**row("", "", 1.5, None), "transport": "tcp"}
    text = doctor_reach.render([tcp, row("a", "x", 40.0, None), row("a", "y", None, "no GIDs that reach each other")])
    assert "tcp: 1.50 GB/s" in text
    assert re.search(r"a +40.00 +FAILED", text)
    assert "rdma a to y: no GIDs that reach each other" in text


def test_ports_that_cannot_be_used_are_left_out() -> None:
    nics = [{"device": "a", "port": "1", "usable": True}, {"device": "b", "port": "2", "usable": False}]
    assert doctor_reach.usable_nics(nics) == ["a:1"]
    assert doctor_reach._without_devices("tc=1,devices=a;b,gpu=3,qps=2") == ["tc=1", "qps=2"]
    assert pdxfer.Config(environment=False, rdma="tc=1,devices=a:1")
