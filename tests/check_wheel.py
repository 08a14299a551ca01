"""Is a built wheel fit for every machine? `python tests/check_wheel.py WHEEL [--device-code]`.

Fails when its native module needs anything beyond glibc, has an undefined symbol of CUDA, verbs or NCCL, exports more
than its entry point, needs a glibc newer than MAX_GLIBC, or when the wheel is over MAX_BYTES or lacks a file that users
need. Prints what it found. Exit code 0 or 1. Needs readelf (binutils).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MAX_BYTES = 5_000_000
MAX_GLIBC = (2, 35)  # Ubuntu 22.04, the oldest base of the images that SGLang publishes
GLIBC_PARTS = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1"}
LOADER = re.compile(r"ld-linux[-\w]*\.so\.\d")
FOREIGN = re.compile(r"^(ibv_|rdma_|nccl|cu[A-Z]|cuda|nvml|__cuda)")
FILES = ("pdxfer/py.typed", "pdxfer/_core.pyi", "pdxfer/__init__.py", "pdxfer/cli.py", "pdxfer/doctor.py")
DEVICE_CODE_MARK = b"pdx_paged_copy"  # the kernel's name stands in every image


def readelf(flag: str, module: Path) -> str:
    """Output of one readelf call."""
    return subprocess.run(["readelf", "-W", flag, str(module)], capture_output=True, text=True, check=True).stdout


def check_module(module: Path) -> tuple[list[str], list[str]]:
    """(findings, facts) about one shared object."""
    findings = []
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-d", module))
    for name in needed:
        if name not in GLIBC_PARTS and not LOADER.fullmatch(name):
            findings.append(f"needs {name}, which is not a part of glibc")
    undefined, exported = [], []
    for where, name in re.findall(
        r"^ *\d+: .* (?:DEFAULT|PROTECTED) +(\w+) (\S+)", readelf("--dyn-syms", module), re.M
    ):
        (undefined if where == "UND" else exported).append(name)
    findings += [f"undefined symbol {s}: load it at run time" for s in undefined if FOREIGN.match(s)]
    extra = [s for s in exported if not s.startswith("PyInit_")]
    if extra:
        findings.append(f"exports {len(extra)} symbols beside its entry point: {', '.join(extra[:5])}")
    versions = {tuple(map(int, v.split("."))) for s in undefined for v in re.findall(r"@GLIBC_([\d.]+)", s)}
    newest = max(versions, default=(0,))
    if newest > MAX_GLIBC:
        late = [s for s in undefined if s.endswith("@GLIBC_" + ".".join(map(str, newest)))]
        findings.append(f"needs glibc {newest} for {', '.join(late)}; at most {MAX_GLIBC}")
    if "(RPATH)" in readelf("-d", module) or "(RUNPATH)" in readelf("-d", module):
        findings.append("has a run path: a folder of the build machine")
    facts = [f"NEEDED {' '.join(needed)}", f"newest glibc symbol {'.'.join(map(str, newest))}"]
    return findings, facts


def check_wheel(wheel: Path, device_code: bool) -> tuple[list[str], list[str]]:
    """(findings, facts) about a wheel; device_code: it must carry some."""
    size = wheel.stat().st_size
    findings = [f"{size} bytes, at most {MAX_BYTES}"] if size > MAX_BYTES else []
    facts = [f"{wheel.name}: {size} bytes"]
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        findings += [f"lacks {name}" for name in FILES if name not in names]
        if not any(name.endswith("/LICENSE") for name in names):
            findings.append("lacks the LICENSE")
        modules = [name for name in names if re.fullmatch(r"pdxfer/_core\..*\.so", name)]
        findings += [f"has {len(modules)} native modules, not one"] if len(modules) != 1 else []
        findings += [f"carries {n}" for n in names if n.endswith((".a", ".o", ".so")) and n not in modules]
        for name in modules:
            path = Path(archive.extract(name, folder))
            more, about = check_module(path)
            findings += [f"{name}: {text}" for text in more]
            present = DEVICE_CODE_MARK in path.read_bytes()
            facts += [
                f"{name}: {path.stat().st_size} bytes",
                *about,
                f"device code {'present' if present else 'absent'}",
            ]
            if device_code and not present:
                findings.append(f"{name}: carries no device code")
    return findings, facts


def main() -> int:
    """Check one wheel; returns 1 when something was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--device-code", action="store_true", help="fail when the module carries no device code")
    args = parser.parse_args()
    findings, facts = check_wheel(args.wheel, args.device_code)
    print("\n".join(facts + [f"FAILED: {text}" for text in findings]))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
