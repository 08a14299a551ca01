"""Starting, watching and killing the servers of the end-to-end tests: SGLang's and the router's.

Every server is a process group of its own, writes one log, and ends with its group; a server that dies while it is
waited for fails the test with the end of its log.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

READY_S = 240.0
STOP_S = 10.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now, below the range from which the kernel gives ports to those who name none.

    A server takes half a minute before it binds its port, and SGLang's own processes take dozens of unnamed ones
    meanwhile: out of that range, one of them would now and then get the server's.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    for port in random.sample(range(10_000, lowest), lowest - 10_000):
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("0.0.0.0", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"fewer than {count} ports from 10000 to {lowest} are free")


def http_status(url: str, timeout: float = 5.0) -> int:
    """The status code of a GET; 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@dataclass
class Usage:
    """Resources of all processes of a server together."""

    rss_bytes: int
    fds: int
    threads: int


@dataclass
class Process:
    """One server: a command in a process group of its own."""

    name: str
    command: list[str]
    port: int
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    ready_path: str = "/health"
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Process:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )
        return self

    def wait_ready(self, timeout: float = READY_S) -> Process:
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while http_status(self.url + self.ready_path) != 200:
            assert self.process.poll() is None, f"{self.name} exited with {self.process.returncode}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"{self.name} was not ready after {timeout:.0f} s:\n{self.tail()}"
            time.sleep(0.25)
        return self

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL to the whole group, as a machine that loses power would look to its peers."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def terminate(self) -> None:
        """SIGTERM: the beginning of `stop`, for several servers at once."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to what is left of the group."""
        if self.process is None:
            return
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_S)
        self.kill()
        self.process = None

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.text().splitlines()[-lines:])

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def members(self) -> Iterator[Path]:
        """/proc folders of the group's processes."""
        assert self.process is not None
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, ValueError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(fields[2]) == self.process.pid:
                        yield entry

    def usage(self) -> Usage:
        rss = fds = threads = 0
        for entry in self.members():
            with contextlib.suppress(OSError):
                status = dict(line.split(":", 1) for line in (entry / "status").read_text().splitlines() if ":" in line)
                rss += int(status.get("VmRSS", "0 kB").split()[0]) * 1024
                threads += int(status["Threads"])
                fds += len(list((entry / "fd").iterdir()))
        return Usage(rss, fds, threads)


@dataclass
class Sglang:
    """One installed SGLang: how its servers are started on a CPU."""

    version: str
    python: str
    logs: Path
    started: int = 0

    def server(
        self,
        name: str,
        model: Path,
        *arguments: str,
        port: int | None = None,
        environment: dict[str, str] | None = None,
        serve: bool = False,
        tokenizer: bool = False,
        tp: int = 1,
    ) -> Process:
        """A server that is not started yet. `serve`: through ``sglang serve`` instead of ``python -m``."""
        self.started += 1
        port = port or free_ports(1)[0]
        launcher = (
            [str(Path(self.python).parent / "sglang"), "serve"]
            if serve
            else [self.python, "-m", "sglang.launch_server"]
        )
        command = [
            *launcher, "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu",
            "--attention-backend", "torch_native", "--dtype", "float32", "--max-total-tokens", "4096",
            "--max-running-requests", "8", "--grammar-backend", "none", "--skip-server-warmup", "--sleep-on-idle",
            *([] if tokenizer else ["--skip-tokenizer-init"]), *arguments,
        ]  # fmt: skip
        env = {
            "SGLANG_USE_CPU_ENGINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "PDXE2E_PAGED": "1" if self.version == "0.5.17" else "0",  # newer ones have a host path of their own
            **(environment or {}),
        }
        if tp > 1:
            command += ["--tp", str(tp)]
            cores = sorted(os.sched_getaffinity(0))
            env["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[i % len(cores)]) for i in range(tp))
        log = self.logs / f"{self.version}-{self.started:02d}-{name}.log"
        return Process(name, command, port, log, env)


@dataclass
class Pair:
    """A prefill and a decode server over pdxfer."""

    prefill: Process
    decode: Process
    bootstrap_port: int


def role(sglang: Sglang, mode: str, bootstrap_port: int) -> list[str]:
    """The arguments that make a server one half of a pair."""
    arguments = ["--disaggregation-mode", mode, "--disaggregation-transfer-backend", "pdxfer"]
    if mode == "prefill":
        arguments += ["--disaggregation-bootstrap-port", str(bootstrap_port)]
    elif sglang.version != "0.5.17":  # its other way of keeping retracted requests calls CUDA
        arguments += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
    return arguments


def router(python: str, pair: Pair, log: Path) -> Process:
    """sglang-router in front of a pair. /health answers before workers are known; /readiness does not."""
    port = free_ports(1)[0]
    command = [
        python, "-m", "sglang_router.launch_router", "--pd-disaggregation", "--prefill", pair.prefill.url,
        str(pair.bootstrap_port), "--decode", pair.decode.url, "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    return Process("router", command, port, log, ready_path="/readiness")
