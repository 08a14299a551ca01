"""`import pdxfer` is quick and touches no GPU library: `python tests/check_import.py`, with the Python that has it.

Prints the time of the import, the best of several fresh processes; exit code 1 when it is over LIMIT_S, or when it
brought in NumPy, torch, SGLang or a library of CUDA, verbs or NCCL.
"""

from __future__ import annotations

import subprocess
import sys

LIMIT_S = 0.2
PROBE = """
import time
begin = time.perf_counter()
import pdxfer
end = time.perf_counter()
import re, sys
maps = open("/proc/self/maps").read()
bad = sorted({"numpy", "torch", "sglang", "matplotlib"} & set(sys.modules))
bad += sorted(set(re.findall(r"lib(?:cuda|cudart|ibverbs|nccl)\\.so", maps)))
print(end - begin, ",".join(bad) or "-")
"""


def measure(tries: int = 7) -> tuple[float, str]:
    """(seconds of the import, what should not have been loaded or "-"): the best of tries, each in a new process."""
    best = (float("inf"), "-")
    for _ in range(tries):
        run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60, check=True)
        seconds, bad = run.stdout.split()
        best = min(best, (float(seconds), bad))
    return best


def main() -> int:
    """Measure and judge; returns the exit code."""
    seconds, bad = measure()
    print(f"import pdxfer: {seconds * 1e3:.0f} ms; at most {LIMIT_S * 1e3:.0f} ms")
    if bad != "-":
        print(f"FAILED: it loaded {bad}")
    if seconds > LIMIT_S:
        print("FAILED: too slow")
    return 1 if bad != "-" or seconds > LIMIT_S else 0


if __name__ == "__main__":
    sys.exit(main())
