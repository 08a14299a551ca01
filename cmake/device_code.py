"""Find a CUDA compiler, compile the device code, and write it as C++ byte arrays.

    device_code.py find  [--mode auto|required|off] [--compiler PATH]
    device_code.py build [--mode ...] [--compiler PATH] --source X.cu --include DIR --out FILE.inc

Run by cmake/device_code.cmake at configure and at build time, and by CI; needs only the standard library.

A compiler is nvcc (PATH, CUDA_HOME, /usr/local/cuda*, or NVIDIA's nvidia-cuda-nvcc wheel in the Python that runs this)
or NVRTC (nvidia-cuda-nvrtc wheels, also beside torch: a whole CUDA C++ compiler in one library, and all that NVIDIA's
CUDA 12 wheels offer, which carry no nvcc program). Among those found, the one whose PTX the most drivers
can compile wins: 12.8 and later 12.x before 13.x (a CUDA 12 driver refuses PTX ISA 9.0), before older ones, which lack
the newest architectures.

One image per architecture (SASS) and one PTX for the lowest go into FILE.inc, which csrc/pack/device_code.cpp includes.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ARCHS = (80, 90, 100, 120)  # SASS of x0 runs on every x.y; anything else compiles the PTX at load time


class CompileError(Exception):
    """The compiler was found and failed; the text is what it said."""


@dataclasses.dataclass(frozen=True)
class Compiler:
    """One way to compile: kind is "nvcc" or "nvrtc", path its program or library, archs the SASS it can emit."""

    kind: str
    path: str
    version: tuple[int, int, int]
    archs: tuple[int, ...]

    @property
    def version_text(self) -> str:
        """12.9 or 13.0.88: what the compiler says of itself."""
        return ".".join(str(part) for part in (self.version if self.version[2] else self.version[:2]))

    @property
    def rank(self) -> tuple[int, tuple[int, int, int]]:
        """Higher is better: see the module's text."""
        major, minor, _ = self.version
        group = 3 if major == 12 and minor >= 8 else 2 if major >= 13 else 1
        newest_first = self.version if group != 2 else (-major, -minor, 0)
        return group, newest_first


def wheel_roots() -> list[Path]:
    """Folders in which NVIDIA's wheels unpack for the Python that runs this, and for build isolation's overlay."""
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path}
    return [Path(p) / "nvidia" for p in sorted(filter(None, places)) if (Path(p) / "nvidia").is_dir()]


def nvcc_candidates() -> list[str]:
    """Paths of nvcc programs, likely ones first; duplicates by real path removed."""
    found = [
        shutil.which("nvcc"),
        *(os.path.join(os.environ.get(v, ""), "bin/nvcc") for v in ("CUDA_HOME", "CUDA_PATH")),
    ]
    found += sorted(glob.glob("/usr/local/cuda*/bin/nvcc"))
    for root in wheel_roots():
        found += sorted(str(p) for p in root.glob("*/bin/nvcc"))
    kept: dict[str, str] = {}
    for path in found:
        if path and os.access(path, os.X_OK):
            kept.setdefault(os.path.realpath(path), path)
    return list(kept.values())


def nvrtc_candidates() -> list[str]:
    """Paths of NVRTC libraries: from wheels, then beside system toolkits."""
    found: list[str] = []
    for root in wheel_roots():
        found += sorted(str(p) for p in root.glob("*/lib/libnvrtc.so.*"))
    for folder in ("lib64", "targets/*/lib"):
        found += sorted(glob.glob(f"/usr/local/cuda*/{folder}/libnvrtc.so.*"))
    return list({os.path.realpath(p): p for p in found if "alt" not in Path(p).name}.values())


def probe_nvcc(path: str) -> Compiler | str:
    """What the nvcc at path is, or why it cannot be used."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
        listed = subprocess.run(
            [path, "--list-gpu-code"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path}: {error}"
    version = re.search(r"V(\d+)\.(\d+)\.(\d+)", said)
    if version is None:
        return f"{path}: its --version names no version"
    archs = tuple(a for a in ARCHS if f"sm_{a}" in listed.split())
    if not archs:
        return f"{path}: supports none of the architectures {ARCHS}"
    return Compiler("nvcc", path, (int(version[1]), int(version[2]), int(version[3])), archs)


def probe_nvrtc(path: str) -> Compiler | str:
    """What the NVRTC library at path is, or why it cannot be used."""
    try:
        lib = ctypes.CDLL(path)
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        lib.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        lib.nvrtcGetSupportedArchs(known)
    except (OSError, AttributeError) as error:
        return f"{path}: {error}"
    archs = tuple(a for a in ARCHS if a in list(known))
    if not archs:
        return f"{path}: supports none of the architectures {ARCHS}"
    return Compiler("nvrtc", path, (major.value, minor.value, 0), archs)


def find(mode: str, explicit: str | None) -> tuple[Compiler | None, str]:
    """The compiler to use, or None and the reason. Raises CompileError when one is demanded."""
    if mode == "off":
        return None, "switched off (PDXFER_DEVICE_CODE=off)"
    if explicit:
        nvrtc = "nvrtc" in Path(explicit).name
        named = (probe_nvrtc if nvrtc else probe_nvcc)(shutil.which(explicit) or explicit)
        if isinstance(named, str):
            raise CompileError(f"PDXFER_CUDA_COMPILER: {named}")
        return named, ""
    probed = [probe_nvcc(p) for p in nvcc_candidates()] + [probe_nvrtc(p) for p in nvrtc_candidates()]
    usable = [c for c in probed if isinstance(c, Compiler)]
    if usable:
        return max(usable, key=lambda c: c.rank), ""
    failures = [c for c in probed if isinstance(c, str)]
    reason = "no CUDA compiler found (looked for nvcc on PATH, in CUDA_HOME and /usr/local/cuda*, and for the wheels "
    reason += "nvidia-cuda-nvcc, nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvrtc in the build's Python)"
    reason = "; ".join([reason, *failures])
    if mode == "required":
        raise CompileError(reason + "; install one, for example: pip install nvidia-cuda-nvrtc-cu12")
    return None, reason


def run(command: list[str]) -> None:
    """Run one compiler command; raises CompileError with its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\nfailed with {done.returncode}:\n{done.stdout}{done.stderr}")


def compile_nvcc(compiler: Compiler, source: Path, include: Path, arch: int, ptx: bool) -> bytes:
    """One image by nvcc: SASS for sm_<arch>, or PTX for compute_<arch>."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "image"
        target = f"arch=compute_{arch},code={'compute' if ptx else 'sm'}_{arch}"
        run([compiler.path, "-std=c++17", "-O3", f"-I{include}", "--ptx" if ptx else "--cubin", "-gencode", target,
             "-o", str(out), str(source)])  # fmt: skip
        return out.read_bytes()


def compile_nvrtc(compiler: Compiler, source: Path, include: Path, arch: int, ptx: bool) -> bytes:
    """One image by NVRTC; the same contract as compile_nvcc."""
    lib = ctypes.CDLL(compiler.path)
    program = ctypes.c_void_p()

    def check(code: int, what: str) -> None:
        if code != 0:
            lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            size = ctypes.c_size_t()
            lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value + 1)
            lib.nvrtcGetProgramLog(program, log)
            raise CompileError(
                f"{compiler.path}: {what}: {lib.nvrtcGetErrorString(code).decode()}\n{log.value.decode()}"
            )

    flags = [f"-arch={'compute' if ptx else 'sm'}_{arch}", "-std=c++17", f"-I{include}"]
    options = (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags))
    text = source.read_bytes()
    check(
        lib.nvrtcCreateProgram(ctypes.byref(program), text, str(source).encode(), 0, None, None), "nvrtcCreateProgram"
    )
    try:
        check(lib.nvrtcCompileProgram(program, len(flags), options), f"compiling for {flags[0]}")
        size = ctypes.c_size_t()
        kind = "PTX" if ptx else "CUBIN"
        check(getattr(lib, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)), "size of the image")
        image = ctypes.create_string_buffer(size.value)
        check(getattr(lib, f"nvrtcGet{kind}")(program, image), "the image")
        return image.raw
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def literal(text: str) -> str:
    """A C++ string literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def array(name: str, data: bytes) -> str:
    """A C++ definition of a byte array, aligned as the driver reads ELF."""
    rows = (",".join(str(b) for b in data[i : i + 64]) for i in range(0, len(data), 64))
    return f"alignas(64) constexpr unsigned char {name}[] = {{\n" + ",\n".join(rows) + "};\n"


def build(compiler: Compiler | None, reason: str, source: Path, include: Path) -> tuple[str, str]:
    """The text of FILE.inc, and one line for the build's output."""
    head = "// Made by cmake/device_code.py; do not edit.\n"
    if compiler is None:
        text = f'constexpr DeviceCode kCode{{"", "", "", {literal(reason)}, {{}}}};\n'
        return head + text, f"device code: not built: {reason}"
    one = compile_nvcc if compiler.kind == "nvcc" else compile_nvrtc
    parts, rows, total = [head], [], 0
    for arch in compiler.archs:
        data = one(compiler, source, include, arch, False)
        parts.append(array(f"kSm{arch}", data))
        rows.append(f"{{{arch}, false, kSm{arch}, sizeof(kSm{arch})}}")
        total += len(data)
    low = compiler.archs[0]
    ptx = one(compiler, source, include, low, True).rstrip(b"\0") + b"\0"  # the driver reads PTX up to its NUL
    isa = re.search(rb"^\.version (\S+)", ptx, re.MULTILINE)
    version = isa[1].decode() if isa else "unknown"
    parts.append(array(f"kPtx{low}", ptx))
    rows.append(f"{{{low}, true, kPtx{low}, sizeof(kPtx{low})}}")
    total += len(ptx)
    parts.append(f"constexpr DeviceImage kImages[] = {{{', '.join(rows)}}};\n")
    fields = ", ".join(literal(t) for t in (compiler.kind, compiler.version_text, version, ""))
    parts.append(f"constexpr DeviceCode kCode{{{fields}, kImages}};\n")
    sass = " ".join(f"sm_{a}" for a in compiler.archs)
    line = f"device code: {total} bytes by {compiler.kind} {compiler.version_text}: SASS {sass}, "
    line += f"PTX {version} for compute_{low}"
    if compiler.version[0] >= 13:
        line += "; drivers of CUDA 12 cannot compile this PTX (docs/gotchas.md)"
    return "".join(parts), line


def main() -> int:
    """Entry point; see the module's text. Exit code 1 with the compiler's words when it failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["find", "build"])
    parser.add_argument("--mode", choices=["auto", "required", "off"], default="auto")
    parser.add_argument("--compiler")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--include", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    try:
        compiler, reason = find(args.mode, args.compiler)
        if args.action == "find":
            found = f"{compiler.kind} {compiler.version_text} ({compiler.path})" if compiler else f"not built: {reason}"
            print(f"device code: {found}")
            return 0
        if not (args.source and args.include and args.out):
            parser.error("build needs --source, --include and --out")
        text, line = build(compiler, reason, args.source, args.include)
    except CompileError as error:
        print(f"device code: {error}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
