"""Rows through another library, each library and transport in its own pair of processes.

`run_peer` starts `python -m pdxfer.bench.worker`, which is a sending end with its own receiving end, and reads rows
from it. A library that crashes or hangs costs the row it was on: the worker is started again for the rows left.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from pdxfer.bench.channel import Channel, connect
from pdxfer.bench.errors import BenchError, describe
from pdxfer.bench.memory import machine
from pdxfer.bench.movers import MOVERS, Options, Path
from pdxfer.bench.remote import spawn
from pdxfer.bench.runner import Row, Runner, Settings, failed_figures, head
from pdxfer.bench.workloads import Workload, workload_from_json

RECEIVER_DEVICES = "BENCH_RECEIVER_CUDA_DEVICES"  # what --isolate lets the receiving end see; set by the command line
SILENCE_SECONDS = 150.0  # a worker that says nothing for so long hangs: two bounded transfers and a verification
_MODULES = {"nixl": ("nixl", "nixl_cu13"), "mooncake": ("mooncake",), "nccl": ("torch",), "memcpy-batch": ("ctypes",)}


@dataclass(frozen=True)
class Job:
    """What a worker is to do; travels through its stdin as JSON."""

    library: str
    options: Options
    settings: Settings
    works: list[Workload]
    address: str | None  # a listening bench, or None: the worker starts its receiving end itself
    version: str

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def job_from_json(text: bytes) -> Job:
    fields = json.loads(text)
    fields["options"] = Options(**fields["options"])
    fields["settings"] = Settings(**fields["settings"])
    fields["works"] = [workload_from_json(work) for work in fields["works"]]
    return Job(**fields)


def open_channel(options: Options, address: str | None, version: str) -> tuple[Channel, subprocess.Popen[bytes] | None]:
    """A channel to the receiving end at `address`, or to one that is started here. The process is the caller's."""
    if address is not None:
        return connect(address, options.secret, version), None
    ours, theirs = socket.socketpair()
    try:
        environment = {"PDXFER_SECRET": options.secret} if options.secret else {}
        if options.isolate:
            environment["CUDA_VISIBLE_DEVICES"] = os.environ[RECEIVER_DEVICES]
        process = spawn(theirs, environment)
    except OSError as error:
        ours.close()
        raise BenchError(f"cannot start the receiving end: {error}") from None
    finally:
        theirs.close()
    return Channel(ours, "the receiving end"), process


def stop(process: subprocess.Popen[bytes] | None, seconds: float = 10.0) -> None:
    """Wait for a process whose channel was closed; end it when it does not."""
    if process is None:
        return
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def missing(library: str) -> str | None:
    """Why a peer library cannot be used on this end at all; None when it is installed."""
    if not any(importlib.util.find_spec(module) for module in _MODULES[library]):
        return f"{library} is not installed, its rows are left out ({MOVERS[library][1]})"
    return None


def run_peer(job: Job, step: Callable[[Workload, float], None], note: Callable[[str], None]) -> Iterator[Row]:
    """A row for every workload that the library could be started for."""
    left = list(job.works)
    while left:
        done = 0
        for message in _messages(dataclasses.replace(job, works=left), left):
            if "step" in message:
                step(left[min(done, len(left) - 1)], message["step"])
            elif "unavailable" in message:
                note(f"{job.library} cannot be used, its rows are left out: {message['unavailable']}")
                return
            else:
                done += 1
                yield message["row"]
        left = left[done:]


def _messages(job: Job, left: list[Workload]) -> Iterator[dict[str, Any]]:
    """What one worker says; its crash or silence becomes the failed row of the workload it was on."""
    done = 0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pdxfer.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        assert process.stdin is not None and process.stdout is not None
        reason = ""
        try:
            process.stdin.write(job.to_json())
            process.stdin.close()
            lines = _lines(process.stdout)
            for line in lines:
                message = json.loads(line)
                done += "row" in message
                yield message
                if message.get("unavailable"):
                    return
        except TimeoutError:
            reason = f"{job.library} hung: nothing for {SILENCE_SECONDS:g} s"
        except OSError as error:
            reason = f"the worker could not be driven: {error}"
        finally:
            _end(process)
        if done == 0 or (process.returncode != 0 and done < len(left)):
            tail = _tail(log)
            reason = reason or f"{job.library}'s process ended with code {process.returncode}"
            yield {"row": _lost_row(job, left[done], f"{reason}{': ' + tail if tail else ''}")}


def _end(process: subprocess.Popen[bytes]) -> None:
    """The worker closes its stdout last; one that is still alive long after is stuck in its library's destructors."""
    assert process.stdout is not None
    process.stdout.close()
    stop(process, 5.0)


def _lines(stream: Any) -> Iterator[bytes]:
    pending = b""
    deadline = time.monotonic() + SILENCE_SECONDS
    while True:
        if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError
        data = os.read(stream.fileno(), 1 << 16)
        if not data:
            return
        deadline = time.monotonic() + SILENCE_SECONDS
        *lines, pending = (pending + data).split(b"\n")
        yield from lines


def _tail(log: Any) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-400:]


def _lost_row(job: Job, work: Workload, reason: str) -> Row:
    return head(job.library, Path(job.options.transport, ""), job.options, work, machine()) | failed_figures(reason)


def serve(job: Job, out: BinaryIO) -> None:
    """The worker's side: rows and steps as JSON lines on `out`. Ends after a failed row: the library is suspect."""

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message).encode() + b"\n")
        out.flush()

    channel, process = open_channel(job.options, job.address, job.version)
    try:
        runner = Runner(channel, job.settings, lambda _, fraction: say({"step": fraction}))
        try:
            for row in runner.run(job.library, job.options, job.works):
                say({"row": row})
                if row["failed"]:
                    return
        except ImportError as error:
            say({"unavailable": describe(error)})
            return
        runner.goodbye()
    finally:
        channel.close()
        stop(process)


def main() -> int:
    job = job_from_json(sys.stdin.buffer.readline())
    # Libraries print what they like on stdout; keep the real one for rows and give them stderr.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(job, out)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    out.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
