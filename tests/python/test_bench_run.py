"""Runs of the bench: with a library made for the test, whose faults are known, and with the engine itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bench_library import QUICK, Library, run

from pdxfer.bench import ceiling
from pdxfer.bench.ceiling import MemcpyCeiling, SharedTarget, StreamCeiling, StreamSink
from pdxfer.bench.channel import Channel
from pdxfer.bench.errors import BenchError
from pdxfer.bench.memory import allocate
from pdxfer.bench.movers import Options
from pdxfer.bench.runner import Runner, Settings
from pdxfer.bench.worker import open_channel, stop
from pdxfer.bench.workloads import Workload

# A shell without job control starts background jobs with SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

WORK = Workload("Qwen2.5-7B", 16, 128, "random", 512)


def test_a_right_library_is_verified(channel: Channel, library: Library) -> None:
    works = [WORK, Workload("Qwen2.5-7B", 1, 128, "busy-decode", 512)]
    rows = run(channel, works)
    assert [row["verified"] for row in rows] == [True, True]
    first = rows[0]
    assert first["bytes"] == 56 * 128 * 1024 and first["repeats"] == 3 and first["peer"] == "test"
    assert first["gbps"] == pytest.approx(first["bytes"] / first["p50_ms"] / 1e6)
    assert first["percent_of_ceiling"] == pytest.approx(100 * first["gbps"] / first["ceiling_gbps"])
    assert "memcpy" in first["ceiling_kind"] and first["versions"]["library"] == "1"
    assert library.opened == library.closed == 2  # one pool: opened once at either end


@pytest.mark.parametrize(
    ("fault", "text"),
    [("flips", "buffer 20, entry 3 "), ("spills", "a byte outside the target pages changed: buffer 55")],
)
def test_wrong_bytes_fail_the_row(channel: Channel, library: Library, fault: str, text: str) -> None:
    library.fault = fault
    (row,) = run(channel, [WORK])
    assert row["verified"] is False and text in row["wrong"]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("lazy", "repeat 2: .*had not arrived"),
        ("raises", "TimeoutError: took too long"),
        ("refused", "ConnectionError: nobody there"),
        ("no notice", "no notice of arrival"),
    ],
)
def test_failures_become_rows_and_the_next_row_starts_afresh(
    channel: Channel, library: Library, fault: str, text: str
) -> None:
    library.fault = fault
    runner = Runner(channel, QUICK, lambda work, fraction: None)
    rows = runner.run("test", Options("shm"), [WORK, WORK])
    row = next(rows)
    assert re.search(text, row["failed"]) and row["gbps"] is None and row["verified"] is False
    library.fault = ""
    assert next(rows)["verified"] is True
    assert list(rows) == []


def test_without_verification_nothing_is_claimed(channel: Channel, library: Library) -> None:
    library.fault = "flips"
    (row,) = run(channel, [WORK], Settings(repeats=2, warmups=0, verify=False, ceiling=False))
    assert row["verified"] is False and row["wrong"] is None and row["failed"] is None
    assert row["ceiling_gbps"] is None and row["percent_of_ceiling"] is None


def test_a_library_that_is_not_there_is_not_a_row(channel: Channel, library: Library) -> None:
    library.fault = "missing"
    with pytest.raises(ImportError):
        run(channel, [WORK])


def test_a_slow_library_gets_fewer_repeats(channel: Channel, library: Library) -> None:
    (row,) = run(channel, [WORK], Settings(repeats=50, warmups=3, least=2, row_seconds=0.0))
    assert row["repeats"] == 2


def test_page_lists_that_differ_are_refused(channel: Channel, library: Library) -> None:
    channel.call("pool", workload=WORK.to_json())
    with pytest.raises(BenchError, match="different page lists"):
        channel.call("row", workload=WORK.to_json(), digest=1)


def test_requests_out_of_order_or_unknown_are_answered(channel: Channel) -> None:
    with pytest.raises(BenchError, match="no pool"):
        channel.call("row", workload=WORK.to_json(), digest=1)
    with pytest.raises(BenchError, match="'dance' is not known"):
        channel.call("dance")
    with pytest.raises(BenchError, match="does not fit"):
        channel.call("pool", workload=Workload("Llama-3.1-70B", 1, 1 << 30, "random", 1 << 30).to_json())


def test_a_receiving_end_that_dies_ends_the_run(library: Library) -> None:
    channel, process = open_channel(Options("shm"), None, "1")
    assert process is not None
    try:
        runner = Runner(channel, QUICK, lambda work, fraction: None)
        os.kill(process.pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(BenchError, match="the receiving end"):
            list(runner.run("test", Options("shm"), [WORK]))
        assert time.monotonic() - begin < 5
    finally:
        channel.close()
        stop(process)


def test_the_receiving_end_dies_with_the_sending_end() -> None:
    channel, process = open_channel(Options("shm"), None, "1")
    assert process is not None
    assert channel.call("hello")["pid"] == process.pid
    channel.close()
    assert process.wait(10) == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_memcpy_ceiling_copies_every_byte(threads: int) -> None:
    source = allocate(3, 1 << 20)
    for index, buffer in enumerate(source):
        buffer[:] = np.arange(len(buffer)) * (index + 3) % 251
    total = (2 << 20) + 12345
    target = SharedTarget(total)
    measured = MemcpyCeiling(source, total, target.path(), threads)
    assert measured.measure() > 0
    measured.close()
    assert target._map[:] == np.concatenate(source)[:total].tobytes()
    target.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_stream_ceiling_sends_every_byte(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    drain = ceiling._fill
    monkeypatch.setattr(ceiling, "_fill", lambda sock, view: received.append(1) is None and drain(sock, view))
    sink = StreamSink(host)
    source = allocate(2, (1 << 20) + 77)
    total = (1 << 20) + 1000
    streams = StreamCeiling(source, total, host, sink.port, 3)
    assert sum(len(piece) for piece in streams._pieces) == total
    assert streams.measure() > 0 and streams.measure(streams=1) > 0
    streams.close()
    sink.close()
    assert len(received) >= 3


def test_stream_ceiling_without_a_sink() -> None:
    sink = StreamSink("127.0.0.1")
    port = sink.port
    sink.close()
    with pytest.raises(BenchError, match="raw socket streams to 127.0.0.1"):
        StreamCeiling(allocate(1, 100), 100, "127.0.0.1", port, 1)


# ---- the engine itself, as a user starts the bench -------------------------------------------------------------------


def bench(*arguments: str, timeout: float = 100.0, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pdxfer.bench", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


FIELDS = set(
    [
        "transport",
        "path",
        "memory",
        "model",
        "page_size",
        "tokens",
        "pattern",
        "pairs",
        "runs",
        "bytes",
        "gbps",
        "p50_ms",
        "p99_ms",
        "ceiling_gbps",
        "percent_of_ceiling",
        "verified",
        "versions",
        "machine",
        "plan_us",
        "ceiling_kind",
        "ceiling_1stream_gbps",
        "repeats",
        "tp",
        "peer",
    ]
)


@pytest.mark.parametrize("transport", ["shm", "tcp", "auto"])
def test_rows_of_the_engine(transport: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = bench(
        *f"--transport {transport} --tokens 64 --page-size 1,16 --pattern random,busy-decode --repeats 3".split(),
        *("--json", str(path), "--plot", str(tmp_path / "rows.png")),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())
    assert [(row["page_size"], row["pattern"]) for row in rows] == [
        (1, "random"),
        (1, "busy-decode"),
        (16, "random"),
        (16, "busy-decode"),
    ]
    for row in rows:
        assert set(row) >= FIELDS
        assert row["verified"] is True and row["failed"] is None and row["repeats"] == 3
        assert row["transport"] == ("shm" if transport == "auto" else transport) and row["path"]
        assert (row["ceiling_1stream_gbps"] is not None) == (transport == "tcp")
    assert rows[0]["path"] in done.stdout
    assert "[1/4] Qwen2.5-7B p1 random" in done.stderr
    assert (tmp_path / "rows.png").stat().st_size > 10_000


@pytest.mark.parametrize("tp", ["2:1", "1:4", "2:2"])
def test_unequal_ranks_through_the_engine(tp: str) -> None:
    done = bench(*f"--transport shm --tokens 64 --page-size 16 --tp {tp} --repeats 2".split())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("shm_path", ["map", "cma", "staging"])
def test_shm_paths_through_the_engine(shm_path: str) -> None:
    done = bench(*f"--transport shm --shm-path {shm_path} --raw 100 --raw 64KiB --tokens 999 --repeats 2".split())
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_verify_is_loud() -> None:
    done = bench(*["--transport", "shm", "--tokens", "16", "--repeats", "1", "--no-verify", "--no-ceiling"])
    assert done.returncode == 0, done.stderr
    assert "NOT VERIFIED" in done.stderr and done.stdout.split()[-1] == "NO"


def test_a_transport_that_refuses_is_a_failed_row() -> None:
    done = bench(*["--transport", "shm", "--set", "fault=refuse=shm", "--tokens", "16", "--repeats", "1"])
    assert done.returncode == 1
    assert "FAILED: UnavailableError" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--json /no/such/place/rows.json", "--json /no/such/place/rows.json: cannot write there: No such file"),
        ("--plot /no/such/place/rows.png", "there is no directory /no/such/place"),
        ("--connect 127.0.0.1:1", "is `pdxfer bench --listen` running there?"),
        ("--connect 127.0.0.1:1 --listen 127.0.0.1:0", "give one of them"),
        ("--set colour", "expected FIELD=VALUE"),
        ("--tp 3:1", "4 KV heads"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments: str, text: str) -> None:
    done = bench(*arguments.split(), timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert text in done.stderr and "Traceback" not in done.stderr


def test_a_setting_that_does_not_exist() -> None:
    done = bench(*["--transport", "shm", "--set", "colour=red", "--tokens", "16", "--repeats", "1"])
    assert done.returncode == 1 and "colour" in done.stdout and "Traceback" not in done.stderr


def test_peers_that_are_not_installed_are_one_line_each(tmp_path: Path) -> None:
    for name in ("nixl", "mooncake"):  # in front of whatever is installed: a package that is no library
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('this is not the real one')\n")
    done = bench(*["--transport", "tcp", "--tokens", "16", "--repeats", "1", "--peer", "all"], PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("its rows are left out") == 2 and "Traceback" not in done.stderr


@pytest.fixture
def listening() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pdxfer.bench", "--listen", "127.0.0.1:0", "--secret", "s3cret", "--wait", "60"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    found = re.search(r"listening on 127.0.0.1 port (\d+)", process.stderr.readline())
    assert found
    yield process, f"127.0.0.1:{found[1]}"
    process.terminate()
    process.wait(10)
    process.stderr.close()


def test_two_machines(listening: tuple[subprocess.Popen[str], str]) -> None:
    _, address = listening
    arguments = f"--connect {address} --transport tcp --tokens 64 --repeats 2".split()
    wrong = bench(*arguments, "--secret", "other")
    assert wrong.returncode == 2 and "wrong secret" in wrong.stderr
    for _ in range(2):  # one after the other, on the same listener
        done = bench(*arguments, "--secret", "s3cret")
        assert done.returncode == 0, done.stderr
        assert " yes" in done.stdout


def test_a_port_in_use_is_named(listening: tuple[subprocess.Popen[str], str]) -> None:
    done = bench("--listen", listening[1], "--secret", "x")
    assert done.returncode == 2 and "in use" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_rows(number: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    arguments = (
        f"--transport shm --tokens 64 --pattern random,contiguous --repeats 100000 --row-seconds 2 --json {path}"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "pdxfer.bench", *arguments.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while "[2/2]" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert "Qwen2.5-7B p1 random" in out
    assert [row["pattern"] for row in json.loads(path.read_text())] == ["random"]


def test_studies_are_rows_of_their_own(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    options = ["--transport", "shm", "--page-size", "1", "--tokens", "64", "--repeats", "3", "--no-ceiling"]
    command = [sys.executable, "-m", "pdxfer.bench", *options, "--study", "latency,duplex", "--json", str(rows)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    studied = [row for row in json.loads(rows.read_text()) if row.get("study")]
    latency = [row for row in studied if row["study"] == "latency"]
    expected = [(tokens, gap) for tokens in (1, 16, 128) for gap in (0.5, 20)]
    assert [(row["tokens"], row["gap_ms"]) for row in latency] == expected and all(row["verified"] for row in studied)
    assert all(0 < row["notified_us"]["p50"] <= row["call_to_notified_us"]["p99"] for row in latency)
    (both,) = (row for row in studied if row["study"] == "duplex")
    assert both["forward_gbps"] > 0 and both["back_gbps"] > 0
    assert "both ways" in ran.stdout and "submit to notified" in ran.stdout


def test_a_study_that_fails_is_a_failed_row(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    options = ["--transport", "shm", "--page-size", "1", "--tokens", "64", "--repeats", "3", "--no-ceiling"]
    command = [sys.executable, "-m", "pdxfer.bench", *options, "--study", "interference", "--json", str(rows)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100)
    (study,) = (row for row in json.loads(rows.read_text()) if row.get("study"))
    assert "--memory device" in study["failed"] and "FAILED" in ran.stdout
