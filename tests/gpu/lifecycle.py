"""Ends that come and go: cycles of register, connect, transfer and close with what they leave behind, peers killed in
the middle of transfers, and memory of expandable segments. Two GPUs and torch: `python3 tests/gpu/lifecycle.py
[--cycles N] [--kills N] [--json FILE]`; exits with 1 when a check fails.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

PAGE, SLOTS = 1 << 16, 2048  # 128 MiB


def resources() -> dict[str, int]:
    """What a leak would raise: bytes used on the device, open descriptors, resident KiB."""
    import torch

    free, total = torch.cuda.mem_get_info()
    status = Path("/proc/self/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0])
    return {"device_bytes": total - free, "descriptors": len(os.listdir("/proc/self/fd")), "resident_kib": resident}


def pattern(seed: int) -> Any:
    """Bytes both ends can make: uint8 [SLOTS * PAGE] on the device."""
    import torch

    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randint(0, 256, (SLOTS * PAGE,), dtype=torch.uint8, device="cuda", generator=generator)


def config() -> Any:
    import pdxfer

    return pdxfer.Config(transports="cuda_ipc", peer_timeout_ms=3000)


def receiver() -> None:
    """Registers device memory, tells its address, then answers lines: check SEED, resources, again, quit."""
    import torch

    import pdxfer

    engine = pdxfer.Engine(config())
    memory = torch.zeros(SLOTS * PAGE, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    region = engine.register_memory(memory)
    print(json.dumps({"address": engine.address, "pointer": memory.data_ptr()}), flush=True)
    for line in sys.stdin:
        word, *rest = line.split()
        answer: object = None
        if word == "check":
            answer = bool(torch.equal(memory, pattern(int(rest[0]))))
            memory.zero_()
            torch.cuda.synchronize()
        elif word == "resources":
            answer = resources()
        elif word == "again":
            engine.deregister_memory(region)
            region = engine.register_memory(memory)
        engine.poll()
        if word == "quit":
            break
        print(json.dumps(answer), flush=True)
    engine.close()


class Other:
    """The receiver as a child process that sees the second GPU alone."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--receiver"]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.told = self.read()

    def read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("quit\n")
        self.process.stdin.close()
        self.process.wait(20)


def plan_between(source: tuple[int, int], target: tuple[int, int]) -> Any:
    """Every page to its own place."""
    import pdxfer

    def layout(region: tuple[int, int]) -> Any:
        return pdxfer.KvLayout(buffers=[region], page_bytes=PAGE, slots=SLOTS, page_size=1, groups=1, dtype="uint8")

    pages = np.arange(SLOTS, dtype=np.int32)
    return pdxfer.make_plan(pdxfer.pair_layouts(layout(source), layout(target)), pages, pages)


def transfer(engine: Any, memory: Any, other: Other, seed: int) -> bool:
    """One whole life of a connection; true when the other end has every byte."""
    region = engine.register_memory(memory)
    peer = engine.connect(other.told["address"], timeout=20)
    found, offset = peer.find_region(other.told["pointer"], SLOTS * PAGE, timeout=10)
    engine.transfer(peer, plan_between((region.id, 0), (found.id, offset)), tag=seed, timeout=20)
    right = seed < 0 or other.ask(f"check {seed}")
    engine.disconnect(peer)
    engine.deregister_memory(region)
    return bool(right)


def cycles(count: int) -> dict[str, Any]:
    import pdxfer

    other, engine = Other(), pdxfer.Engine(config())
    wrong, marks = 0, []
    for cycle in range(count):
        memory = pattern(7)
        import torch

        torch.cuda.synchronize()
        wrong += not transfer(engine, memory, other, 7)
        if cycle % 10 == 9:
            other.ask("again")
        if cycle + 1 in (20, count // 2, count):
            marks.append({"cycle": cycle + 1, "sender": resources(), "receiver": other.ask("resources")})
    engine.close()
    other.end()
    first, last = marks[0], marks[-1]
    grown = {
        f"{end}_{what}": last[end][what] - first[end][what] for end in ("sender", "receiver") for what in first[end]
    }
    kept = all(
        grown[f"{end}_{what}"] <= 0 for end in ("sender", "receiver") for what in ("device_bytes", "descriptors")
    )
    return {"cycles": count, "wrong": wrong, "marks": marks, "grown": grown, "ok": wrong == 0 and kept}


def kills(count: int) -> dict[str, Any]:
    import pdxfer

    engine = pdxfer.Engine(config())
    memory = pattern(7)
    region = engine.register_memory(memory)
    seconds: list[float] = []
    answers: dict[str, int] = {}
    before = 0
    for _ in range(count):
        other = Other()
        peer = engine.connect(other.told["address"], timeout=20)
        found, offset = peer.find_region(other.told["pointer"], SLOTS * PAGE, timeout=10)
        plan = plan_between((region.id, 0), (found.id, offset))
        batches = [engine.submit(peer, plan, tag=i) for i in range(200)]
        time.sleep(0.01)
        os.kill(other.process.pid, signal.SIGKILL)
        begin = time.monotonic()
        for batch in batches:
            try:
                batch.wait(5)
                answer = "ok"
            except pdxfer.PdxferError as error:
                answer = type(error).__name__
            answers[answer] = answers.get(answer, 0) + 1
        seconds.append(time.monotonic() - begin)
        other.process.wait(20)
        engine.disconnect(peer)
        before = before or resources()["device_bytes"]
    grown = resources()["device_bytes"] - before
    engine.close()
    failed = sum(n for name, n in answers.items() if name != "ok")
    ok = max(seconds) < 1 and failed > 0 and "TransferTimeout" not in answers and grown <= 0
    return {"kills": count, "slowest_s": max(seconds), "answers": answers, "device_bytes_grown": grown, "ok": ok}


def expandable() -> dict[str, Any]:
    """In a process whose torch makes its memory of expandable segments, at both ends."""
    import pdxfer

    other, engine = Other(), pdxfer.Engine(config())
    right = [transfer(engine, pattern(seed), other, seed) for seed in range(10)]
    engine.close()
    other.end()
    return {"transfers": len(right), "right": sum(right), "ok": all(right)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--receiver", action="store_true")
    parser.add_argument("--expandable", action="store_true")
    options = parser.parse_args()
    if options.receiver:
        receiver()
        return 0
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if options.expandable:
        result = expandable()
        print(json.dumps(result), flush=True)
        return 0 if result["ok"] else 1
    results: dict[str, Any] = {}
    if options.kills:
        results["kills"] = kills(options.kills)
        print(json.dumps(results["kills"]), flush=True)
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    child = subprocess.run(
        [sys.executable, __file__, "--expandable"], env=environment, capture_output=True, text=True, timeout=120
    )
    if child.stdout.strip():
        results["expandable"] = json.loads(child.stdout)
    else:
        results["expandable"] = {"ok": False, "error": child.stderr[-2000:]}
    print(json.dumps(results["expandable"]), flush=True)
    if options.cycles:
        results["cycles"] = cycles(options.cycles)
        print(json.dumps(results["cycles"]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(result["ok"] for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
