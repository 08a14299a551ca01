"""Ends that come and go: cycles of register, connect, transfer and close with what they leave behind, senders and
receivers killed in the middle of transfers, and memory of expandable segments. Two GPUs; torch for the last alone:

    python3 tests/gpu/lifecycle.py [--cycles 1000] [--kills 100] [--no-expandable] [--json FILE]

Exits with 1 when a check fails. One GPU belongs to this process, the other to its children, each seeing its own alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

import pdxfer
from pdxfer.bench.cuda import Cuda

PAGE, SLOTS, BUFFERS = 1 << 16, 64, 8  # buffers of 4 MiB in one region: a batch of the copy engine
BYTES = PAGE * SLOTS * BUFFERS
PATTERNS, AHEAD = 4, 4  # kinds of content; children started ahead of their turn
CYCLES_SECONDS, LOST_SECONDS = 0.12, 1.0  # for each cycle, on average; until a killed peer is told
SETTLE_SECONDS = 20.0  # for the driver to take back what a killed process had, and for links to go


@functools.cache
def gpu() -> Cuda:
    """The one of this process; every Cuda has a stream, which stays."""
    return Cuda(0)


class CudaPool:
    """An allocation of its own."""

    def __init__(self) -> None:
        self._cuda = gpu()
        self._buffer = self._cuda.allocate(BYTES)
        self.pointer = self._buffer.pointer

    def put(self, content: Any) -> None:
        self._cuda.upload(self.pointer, content)

    def clear(self) -> None:
        self._cuda.fill(self.pointer, 0, BYTES)

    def get(self) -> Any:
        out = np.empty(BYTES, np.uint8)
        self._cuda.download(out, self.pointer)
        return out


class TorchPool:
    """A tensor, from whatever torch makes its memory of."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._tensor = torch.zeros(BYTES, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        self.pointer = self._tensor.data_ptr()

    def put(self, content: Any) -> None:
        self._tensor.copy_(self._torch.from_numpy(content))
        self._torch.cuda.synchronize()

    def clear(self) -> None:
        self._tensor.zero_()
        self._torch.cuda.synchronize()

    def get(self) -> Any:
        return self._tensor.cpu().numpy()


def pattern(seed: int) -> Any:
    """Bytes both ends can make: uint8 [BYTES]."""
    return np.random.PCG64(seed).random_raw(BYTES // 8).view(np.uint8)


def resources(cuda: Cuda) -> dict[str, int]:
    """What a leak would raise: bytes used on the device, open descriptors, resident KiB."""
    free, total = cuda.memory()
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0])
    return {"device_bytes": total - free, "descriptors": len(os.listdir("/proc/self/fd")), "resident_kib": resident}


def config() -> pdxfer.Config:
    return pdxfer.Config(transports="cuda_ipc", peer_timeout_ms=3000)


def register(engine: pdxfer.Engine, pool: Any) -> Any:
    return engine.register_memory((pool.pointer, BYTES, "cuda:0"))


def plan_to(peer: Any, region: Any, pointer: int) -> Any:
    """Every page to its own place in the peer's region at `pointer`."""
    found, offset = peer.find_region(pointer, BYTES, timeout=10)

    def layout(id: int, begin: int) -> Any:
        buffers = [(id, begin + number * PAGE * SLOTS) for number in range(BUFFERS)]
        return pdxfer.KvLayout(buffers=buffers, page_bytes=PAGE, slots=SLOTS, page_size=1, groups=1, dtype="uint8")

    pages = np.arange(SLOTS, dtype=np.int32)
    return pdxfer.make_plan(pdxfer.pair_layouts(layout(region.id, 0), layout(found.id, offset)), pages, pages)


# ---- children: they say one line of JSON, then answer lines ---------------------------------------------------------


def say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


def be_receiver(torch_memory: bool) -> None:
    """Registers device memory, tells its address, then answers: check SEED, resources, again; ends with its input."""
    engine, pool = pdxfer.Engine(config()), TorchPool() if torch_memory else CudaPool()
    cuda, wanted = gpu(), [pattern(seed) for seed in range(PATTERNS)]
    region = register(engine, pool)
    say({"address": engine.address, "pointer": pool.pointer})
    for line in sys.stdin:
        word, *rest = line.split()
        answer: object = None
        if word == "check":
            answer = bool(np.array_equal(pool.get(), wanted[int(rest[0])]))
            pool.clear()
        elif word == "resources":
            answer = resources(cuda)
        elif word == "again":
            engine.deregister_memory(region)
            region = register(engine, pool)
        engine.poll()
        say(answer)
    engine.close()


def be_sender() -> None:
    """Told an address and a pointer, sends without pause until it is killed; the tag counts."""
    engine, pool = pdxfer.Engine(config()), CudaPool()
    pool.put(pattern(0))
    region = register(engine, pool)
    say({})
    told = json.loads(sys.stdin.readline())
    peer = engine.connect(told["address"], timeout=20)
    plan = plan_to(peer, region, told["pointer"])
    under_way: deque[Any] = deque()
    for tag in range(1 << 40):
        under_way.append(engine.submit(peer, plan, tag=tag))
        if len(under_way) > 16:
            under_way.popleft().wait(10)


def be_watch() -> None:
    """Bytes used on both GPUs, by whoever; for each line that it reads."""
    gpus = [Cuda(0), Cuda(1)]
    say({})
    for _ in sys.stdin:
        used = []
        for gpu in gpus:
            gpu.attach()
            free, total = gpu.memory()
            used.append(total - free)
        say(used)


class Child:
    """One of the above."""

    def __init__(self, role: str, gpus: str) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--role", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._told: Any = None

    @property
    def told(self) -> Any:
        """Its first line."""
        if self._told is None:
            self._told = self._read()
        return self._told

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a child ended with code {self.process.wait(20)}")
        return json.loads(line)

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, line: str) -> Any:
        assert self.told is not None
        self.tell(line)
        return self._read()

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(20)
        self.process.stdout.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


# ---- checks ---------------------------------------------------------------------------------------------------------


def transfer(engine: pdxfer.Engine, pool: Any, other: Child, seed: int) -> tuple[bool, float]:
    """One whole life of a connection: did the other end have every byte, and the seconds of it all but the checking."""
    begin = time.perf_counter()
    region = register(engine, pool)
    peer = engine.connect(other.told["address"], timeout=20)
    engine.transfer(peer, plan_to(peer, region, other.told["pointer"]), tag=seed, timeout=20)
    moved = time.perf_counter()
    right = bool(other.ask(f"check {seed}"))
    checked = time.perf_counter()
    engine.disconnect(peer)
    engine.deregister_memory(region)
    return right, time.perf_counter() - checked + moved - begin


def cycles(count: int) -> dict[str, Any]:
    other, engine, cuda = Child("receiver", "1"), pdxfer.Engine(config()), gpu()
    contents = [pattern(seed) for seed in range(PATTERNS)]
    assert other.told
    wrong, marks, lives = 0, [], []
    begin = time.monotonic()
    for cycle in range(count):
        pool = CudaPool()
        pool.put(contents[cycle % PATTERNS])
        right, seconds = transfer(engine, pool, other, cycle % PATTERNS)
        wrong += not right
        lives.append(seconds)
        del pool
        if cycle % 10 == 9:
            other.ask("again")
        if cycle + 1 in (min(20, count), count // 2, count):
            marks.append({"cycle": cycle + 1, "sender": resources(cuda), "receiver": other.ask("resources")})
    took = time.monotonic() - begin
    engine.close()
    other.end()
    first, last = marks[0], marks[-1]
    ends = ("sender", "receiver")
    grown = {f"{end}_{what}": last[end][what] - first[end][what] for end in ends for what in first[end]}
    kept = all(grown[f"{end}_{what}"] <= 0 for end in ends for what in ("device_bytes", "descriptors"))
    result = {"cycles": count, "wrong": wrong, "seconds": took, "marks": marks, "grown": grown}
    result["life_ms"] = {name: float(np.percentile(lives, q)) * 1e3 for name, q in (("p50", 50), ("p99", 99))}
    return result | {"ok": wrong == 0 and kept and took <= count * CYCLES_SECONDS}


class Kills:
    """Children that are killed in the middle of transfers, senders and receivers in turn; this process goes on."""

    def __init__(self) -> None:
        self.engine, self.pool, self.cuda = pdxfer.Engine(config()), CudaPool(), gpu()
        self.region = register(self.engine, self.pool)
        self.slowest = {"sender": 0.0, "receiver": 0.0}
        self.answers: dict[str, int] = {}
        self.wrong: list[str] = []

    def run(self, count: int) -> None:
        roles = deque(("receiver", "sender")[number % 2] for number in range(count))
        ready: deque[tuple[str, Child]] = deque()
        while roles or ready:
            while roles and len(ready) < AHEAD:
                role = roles.popleft()
                ready.append((role, Child(role, "1")))
            role, child = ready.popleft()
            try:
                seconds = self._receiver(child) if role == "receiver" else self._sender(child)
            finally:
                child.kill()
            self.slowest[role] = max(self.slowest[role], seconds)

    def _count(self, answer: str) -> None:
        self.answers[answer] = self.answers.get(answer, 0) + 1

    def _receiver(self, child: Child) -> float:
        """Seconds from the kill until every batch of ours had ended."""
        peer = self.engine.connect(child.told["address"], timeout=20)
        plan = plan_to(peer, self.region, child.told["pointer"])
        batches = [self.engine.submit(peer, plan, tag=number) for number in range(200)]
        batches[2].wait(10)
        os.kill(child.process.pid, signal.SIGKILL)
        begin = time.monotonic()
        for batch in batches:
            try:
                batch.wait(5)
                self._count("ok")
            except pdxfer.PdxferError as error:
                self._count(type(error).__name__)
        seconds = time.monotonic() - begin
        self.engine.disconnect(peer)
        return seconds

    def _sender(self, child: Child) -> float:
        """Seconds from the kill until we were told; then nothing is written any more, and sending back is refused."""
        before = {peer.id for peer in self.engine.peers()}
        assert child.told is not None
        child.tell(json.dumps({"address": self.engine.address, "pointer": self.pool.pointer}))
        arrived, deadline = 0, time.monotonic() + 20
        while arrived < 3:
            arrived += len(self.engine.poll())
            if time.monotonic() > deadline:
                raise SystemExit(f"{arrived} arrivals of a sender within 20 s")
        (peer,) = [peer for peer in self.engine.peers() if peer.id not in before]
        back = plan_to(peer, self.region, peer.regions[0].pointer)
        os.kill(child.process.pid, signal.SIGKILL)
        begin = time.monotonic()
        while peer.alive and time.monotonic() - begin < 5:
            self.engine.poll()
        seconds = time.monotonic() - begin
        content = self.pool.get()
        try:
            self.engine.submit(peer, back, tag=0).wait(5)
            self._count("ok of a dead sender")
        except pdxfer.PdxferError as error:
            self._count(f"{type(error).__name__} of a dead sender")
        if not np.array_equal(content, self.pool.get()):
            self.wrong.append("pages changed after the sender was told to be dead")
        while self.engine.poll():
            pass
        return seconds


def kills(count: int) -> dict[str, Any]:
    """What the first kills leave (contexts, the driver's own) is the mark that the others must come back to."""
    watch, killed = Child("watch", "0,1"), Kills()
    killed.run(4)
    first, own = watch.ask("now"), resources(killed.cuda)
    killed.run(count)
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        last = watch.ask("now")
        grown = {what: value - own[what] for what, value in resources(killed.cuda).items()}
        both = [b - a for a, b in zip(first, last, strict=True)]
        still = max(both) <= 0 and grown["descriptors"] <= 0
        if still or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    killed.engine.close()
    watch.end()
    answers = killed.answers
    typed = answers.get("PeerLostError", 0) > 0 and answers.get("PeerLostError of a dead sender", 0) == (count + 4) // 2
    others = set(answers) - {"ok", "PeerLostError", "PeerLostError of a dead sender"}
    quick = max(killed.slowest.values()) < LOST_SECONDS
    return {
        "kills": count + 4,
        "slowest_s": killed.slowest,
        "answers": answers,
        "wrong": killed.wrong,
        "device_bytes_grown": both,
        "own_grown": grown,
        "ok": typed and not others and quick and still and not killed.wrong,
    }


def be_expandable() -> dict[str, Any]:
    """In a process whose torch makes its memory of expandable segments, at both ends."""
    other, engine = Child("torch-receiver", "1"), pdxfer.Engine(config())
    right = []
    for number in range(10):
        pool = TorchPool()
        pool.put(pattern(number % PATTERNS))
        right.append(transfer(engine, pool, other, number % PATTERNS)[0])
    engine.close()
    other.end()
    return {"transfers": len(right), "right": sum(right), "ok": all(right)}


def expandable() -> dict[str, Any]:
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    child = subprocess.run(
        [sys.executable, __file__, "--role", "expandable"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if not child.stdout.strip():
        return {"ok": False, "error": child.stderr[-2000:]}
    return dict(json.loads(child.stdout))


ROLES = {
    "receiver": lambda: be_receiver(False),
    "torch-receiver": lambda: be_receiver(True),
    "sender": be_sender,
    "watch": be_watch,
    "expandable": lambda: say(be_expandable()),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--no-expandable", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if options.role:
        ROLES[options.role]()
        return 0
    results: dict[str, Any] = {}
    checks = {
        "kills": (lambda: kills(options.kills)) if options.kills else None,
        "expandable": None if options.no_expandable else expandable,
        "cycles": (lambda: cycles(options.cycles)) if options.cycles else None,
    }
    for name, check in checks.items():
        if check is None:
            continue
        begin = time.monotonic()
        results[name] = check()
        print(f"{name} ({time.monotonic() - begin:.1f} s): {json.dumps(results[name])}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
