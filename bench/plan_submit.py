"""What planning and submitting one request of 32k tokens in 160 buffers costs the caller, cold and warm.

    python bench/plan_submit.py [--pattern contiguous|random] [--transport shm|tcp] [--repeats 30] [--json FILE]

Cold: right after a transfer of all buffers (1.3 GB with the default slots), as between two requests of a server. Warm:
the same request again, while the cold one is under way. The time is `perf_counter` around `make_plan` and
`Engine.submit`, Python included; the transfer itself is not in it. "an empty call" is what the interpreter takes then
for a function that does nothing: no library called from Python can be faster. Both ends run on this machine, the
receiver in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import pdxfer
from pdxfer.bench.memory import machine

TOKENS, BUFFERS, SPARE = 32768, 160, 4096
SECONDS = 60.0
MEASURED = ("plan", "submit", "plan and submit", "an empty call")


def pool(slot_bytes: int) -> list[np.ndarray]:
    return [np.full((TOKENS + SPARE) * slot_bytes, 1, np.uint8) for _ in range(BUFFERS)]


def receive(transport: str, slot_bytes: int) -> None:
    """The other end: registers a pool, and answers each line of its input once the next transfer is there."""
    with pdxfer.Engine(pdxfer.Config(transports=transport)) as engine:
        buffers = pool(slot_bytes)
        for buffer in buffers:
            engine.register_memory(buffer)
        print(json.dumps([engine.address, [buffer.ctypes.data for buffer in buffers]]), flush=True)
        for _ in sys.stdin:
            deadline = time.monotonic() + SECONDS
            while not engine.poll():
                if time.monotonic() > deadline:
                    raise TimeoutError("no transfer arrived")
                time.sleep(1e-3)
            print("arrived", flush=True)


def microseconds(samples: list[float]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(samples, q)) * 1e6, 1) for q in (0, 50, 90)}


def pages_of(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    if pattern == "contiguous":
        src = np.arange(TOKENS, dtype=np.int32)
        return src, src + np.int32(SPARE // 2)
    random = np.random.default_rng(1)
    return tuple(random.permutation(TOKENS + SPARE)[:TOKENS].astype(np.int32) for _ in range(2))


def empty() -> None:
    pass


def measure(transport: str, pattern: str, slot_bytes: int, repeats: int) -> dict[str, object]:
    command = [sys.executable, __file__, "--receive", "--transport", transport, "--slot-bytes", str(slot_bytes)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    times = {state: {name: list[float]() for name in MEASURED} for state in ("cold", "warm")}
    try:
        with pdxfer.Engine(pdxfer.Config(transports=transport)) as engine:
            buffers = pool(slot_bytes)
            mine = [(engine.register_memory(buffer), 0) for buffer in buffers]
            address, pointers = json.loads(child.stdout.readline())
            peer = engine.connect(address, timeout=SECONDS)
            size = (TOKENS + SPARE) * slot_bytes
            theirs = [peer.find_region(pointer, size, timeout=SECONDS) for pointer in pointers]
            layouts = [
                pdxfer.KvLayout(side, page_bytes=slot_bytes, slots=TOKENS + SPARE, groups=2, dtype="bfloat16")
                for side in (mine, theirs)
            ]
            pairing = pdxfer.pair_layouts(*layouts)
            src, dst = pages_of(pattern)
            for tag in range(repeats):
                engine.transfer(peer, pdxfer.make_plan(pairing, src, dst), timeout=SECONDS)
                batches = []
                for state in times:
                    begin = time.perf_counter()
                    plan = pdxfer.make_plan(pairing, src, dst)
                    planned = time.perf_counter()
                    batches.append(engine.submit(peer, plan, tag=tag if state == "warm" else None))
                    submitted = time.perf_counter()
                    times[state]["plan"].append(planned - begin)
                    times[state]["submit"].append(submitted - planned)
                    times[state]["plan and submit"].append(submitted - begin)
                for batch in batches:
                    batch.wait(SECONDS)
                child.stdin.write("\n")
                child.stdin.flush()
                child.stdout.readline()
                engine.transfer(peer, plan, timeout=SECONDS)
                for state in times:
                    begin = time.perf_counter()
                    empty()
                    times[state]["an empty call"].append(time.perf_counter() - begin)
    finally:
        child.stdin.close()
        child.wait(SECONDS)
    return {
        "transport": transport,
        "pattern": pattern,
        "tokens": TOKENS,
        "buffers": BUFFERS,
        "slot_bytes": slot_bytes,
        "bytes_between": TOKENS * BUFFERS * slot_bytes,
        "repeats": repeats,
        **{
            f"{state}_us": {name: microseconds(samples) for name, samples in measured.items()}
            for state, measured in times.items()
        },
        "versions": {"pdxfer": pdxfer.__version__, "python": platform.python_version(), "numpy": np.__version__},
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of planning and submitting a request.")
    parser.add_argument("--pattern", choices=("contiguous", "random"), default="contiguous")
    parser.add_argument("--transport", default="shm")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--slot-bytes", type=int, default=256)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--receive", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.receive:
        receive(arguments.transport, arguments.slot_bytes)
        return
    row = measure(arguments.transport, arguments.pattern, arguments.slot_bytes, arguments.repeats)
    for state in ("cold_us", "warm_us"):
        for name, figures in row[state].items():
            each = figures["p50"] * 1e3 / (TOKENS * BUFFERS)
            print(
                f"{state[:4]}  {name:16s} "
                + "  ".join(f"{key} {value:7.1f} us" for key, value in figures.items())
                + f"  {each:7.4f} ns per page and buffer"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([row], indent=1) + "\n")


if __name__ == "__main__":
    main()
