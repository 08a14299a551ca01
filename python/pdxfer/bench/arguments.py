"""The command line, and the rows that it asks for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pdxfer.bench.errors import BenchError
from pdxfer.bench.movers import DEVICE_PEERS
from pdxfer.bench.runner import BURST_LEAST
from pdxfer.bench.workloads import MODELS, PATTERNS, RAW, Workload, check, find_model, shrunk

POOL_FACTOR = 4.0  # tokens in a pool per token that moves
STUDIES = ("latency", "duplex", "interference")  # bench/studies.py
DEVICE_POOL_FACTOR = 2.0  # every byte of a GPU's pool is copied back for verification
LEAST_FACTOR = 1.25
BURST = 12
SHARE = 0.7  # of the available memory
TARGET = {"tcp": 64_000_000, "rdma": 64_000_000}  # bytes of a row, at most
TARGET_ELSE = 256_000_000

_EPILOG = """examples:
  pdxfer bench                                        the default table: shm and tcp, about a minute
  pdxfer bench --model Llama-3.1-70B --page-size 16 --pattern busy-decode --transport shm
  pdxfer bench --raw 4096 --json rows.json --plot rows.png
  pdxfer bench --peer all                             the same pages through NIXL and Mooncake
  pdxfer bench --memory device --peer all             two GPUs of this machine, every library
  pdxfer bench --listen 0.0.0.0:4790 --secret S       on the receiving machine, then on the sending one:
  pdxfer bench --connect 10.0.0.2:4790 --secret S --transport tcp"""


@dataclass(frozen=True)
class Shape:
    """A row before the transport decides how many tokens it has."""

    model: str
    page_size: int
    pattern: str
    raw_bytes: int = 0
    src_tp: int = 1
    dst_tp: int = 1


# What one wants to know first: SGLang's default page size in its three patterns, bigger pages, MLA, unequal ranks.
DEFAULT_TABLE = (
    Shape("Qwen2.5-7B", 1, "random"),
    Shape("Qwen2.5-7B", 1, "busy-decode"),
    Shape("Qwen2.5-7B", 1, "contiguous"),
    Shape("Qwen2.5-7B", 16, "random"),
    Shape("Qwen2.5-7B", 64, "random"),
    Shape(RAW, 1, "random", raw_bytes=4096),
    Shape("DeepSeek-V3", 1, "random"),
    Shape("DeepSeek-V3", 64, "random"),
    Shape("Qwen2.5-7B", 16, "random", src_tp=2, dst_tp=1),
)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="pdxfer bench",
        description="Measure how fast KV-cache pages move between two processes; every byte is verified.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = out.add_argument_group("where")
    where.add_argument("--listen", metavar="[HOST:]PORT", help="be the receiving end for --connect, until interrupted")
    where.add_argument("--connect", metavar="HOST:PORT", help="send to a listening bench, do not start both ends")
    where.add_argument("--secret", default="", help="shared secret, the same on both ends (or PDXFER_SECRET)")
    where.add_argument(
        "--wait", type=float, default=3600, metavar="S", help="listen no longer than S idle seconds (3600)"
    )
    what = out.add_argument_group("what is moved")
    what.add_argument("--model", action="append", help="repeatable; " + ", ".join(m.name for m in MODELS))
    what.add_argument("--raw", action="append", type=_size, metavar="BYTES", help="blocks of this size instead (64KiB)")
    what.add_argument("--page-size", type=_integers, metavar="N[,N]", help="tokens per page (1)")
    what.add_argument("--tokens", type=_positive, metavar="N", help="tokens that move (up to 256 MB, tcp 64 MB)")
    what.add_argument("--pattern", type=_list, metavar="P[,P]", help=f"{', '.join(PATTERNS)} (random)")
    what.add_argument("--tp", default="1:1", metavar="SRC:DST", help="tensor-parallel sizes; one sending rank (1:1)")
    how = out.add_argument_group("how")
    how.add_argument(
        "--transport",
        type=_list,
        metavar="T[,T]",
        help="shm, tcp, rdma, cuda_ipc, auto (shm,tcp; with --connect: auto; of device memory: cuda_ipc)",
    )
    how.add_argument("--memory", choices=("host", "device"), default="host", help="where the pools are (host)")
    how.add_argument("--device", default="0:1", metavar="SRC:DST", help="GPU of either end (0:1)")
    how.add_argument("--isolate", action="store_true", help="each end sees its own GPU alone (CUDA_VISIBLE_DEVICES)")
    how.add_argument("--sm-budget", type=_integers, metavar="N[,N]", help="thread blocks of a GPU's copies, rows each")
    how.add_argument("--shm-path", help="how shm reaches the other process: auto, map, cma, staging")
    how.add_argument("--tcp-streams", type=_positive, metavar="N", help="connections per tcp peer")
    how.add_argument("--copy-threads", type=_positive, metavar="N", help="threads of host copies")
    how.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="another field of pdxfer.Config")
    how.add_argument("--repeats", type=_positive, default=15, metavar="N", help="timed repeats of a row (15)")
    how.add_argument(
        "--burst", type=int, metavar="N", help=f"transfers back to back after each, 0: none (GPU memory: {BURST})"
    )
    how.add_argument("--row-seconds", type=float, default=10.0, metavar="S", help="fewer repeats after S (10)")
    how.add_argument("--no-verify", action="store_true", help="do not look at what arrived")
    how.add_argument("--no-ceiling", action="store_true", help="do not measure memcpy or raw sockets")
    how.add_argument(
        "--peer", action="append", default=[], choices=[*DEVICE_PEERS, "all"], help="also through that library"
    )
    how.add_argument("--study", type=_list, default=[], metavar="S[,S]", help=f"also: {', '.join(STUDIES)}, or all")
    how.add_argument("--seed", type=int, default=1, help="of contents and page lists (1)")
    result = out.add_argument_group("results")
    result.add_argument("--json", metavar="FILE", help="write the rows")
    result.add_argument("--plot", metavar="FILE.png", help="draw them (needs matplotlib)")
    return out


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _integers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _size(text: str) -> int:
    for unit, factor in (("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("B", 1), ("", 1)):
        if text.endswith(unit) and text[: len(text) - len(unit)].strip().isdigit():
            return _positive(text[: len(text) - len(unit)].strip()) * factor
    raise argparse.ArgumentTypeError(f"{text}: expected a size such as 4096 or 64KiB")


def studies_of(args: argparse.Namespace) -> list[str]:
    for name in args.study:
        if name not in (*STUDIES, "all"):
            raise BenchError(f"--study {name}: expected {', '.join(STUDIES)} or all")
    if args.study and args.connect:
        raise BenchError("--study compares clocks of both ends: it needs them on one machine, without --connect")
    return list(STUDIES) if "all" in args.study else list(dict.fromkeys(args.study))


def burst_of(args: argparse.Namespace) -> int:
    """Transfers of a burst: GPUs and their workers fall asleep between transfers, and a server under load does not
    let them."""
    if args.burst is None:
        return BURST if args.memory == "device" else 0
    if args.burst != 0 and not BURST_LEAST <= args.burst <= 1000:
        raise BenchError(f"--burst {args.burst}: expected 0, or {BURST_LEAST} to 1000")
    return int(args.burst)


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """Fields for pdxfer.Config that the command line gives."""
    fields: dict[str, str] = {}
    for entry in args.set:
        name, equals, value = entry.partition("=")
        if not equals or name in ("host", "port", "secret", "transports"):
            raise BenchError(f"--set {entry}: expected FIELD=VALUE; host, port, secret and transports have own options")
        fields[name] = value
    for name in ("shm_path", "tcp_streams", "copy_threads"):
        if getattr(args, name) is not None:
            fields[name] = str(getattr(args, name))
    return fields


def transports_of(args: argparse.Namespace) -> list[str]:
    usual = ["cuda_ipc"] if args.memory == "device" else ["shm", "tcp"]
    names = args.transport or (["auto"] if args.connect else usual)
    known = ("shm", "tcp", "rdma", "cuda_ipc", "auto") if args.memory == "device" else ("shm", "tcp", "rdma", "auto")
    for name in names:
        if name not in known:
            raise BenchError(f"--transport {name}: expected {', '.join(known)} for {args.memory} memory")
    return list(dict.fromkeys(names))


def devices_of(args: argparse.Namespace) -> tuple[int, int]:
    """The GPUs of the sending and the receiving end."""
    src, colon, dst = args.device.partition(":")
    if not (colon and src.isdigit() and dst.isdigit()):
        raise BenchError(f"--device {args.device}: expected SRC:DST such as 0:1")
    if args.memory != "device" and (args.isolate or args.sm_budget):
        raise BenchError("--isolate and --sm-budget go with --memory device")
    return int(src), int(dst)


def with_budget(settings: dict[str, str], budget: int | None) -> dict[str, str]:
    """The settings with that many thread blocks for copies on a GPU."""
    if budget is None:
        return settings
    options = [part for part in settings.get("cuda", "").split(",") if part and not part.startswith("sm_budget=")]
    return {**settings, "cuda": ",".join([*options, f"sm_budget={budget}"])}


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """The rows asked for; the default table when nothing was."""
    chosen = args.model or args.raw or args.page_size or args.pattern or args.tp != "1:1"
    if not chosen:
        return list(DEFAULT_TABLE)
    src, colon, dst = args.tp.partition(":")
    if not (colon and src.isdigit() and dst.isdigit()):
        raise BenchError(f"--tp {args.tp}: expected SRC:DST such as 2:1")
    if args.raw and (args.page_size or args.tp != "1:1"):
        raise BenchError("--raw moves blocks: it goes with neither --page-size nor --tp")
    patterns = args.pattern or ["random"]
    models = [find_model(name).name for name in args.model or ([] if args.raw else ["Qwen2.5-7B"])]
    shapes = [
        Shape(model, page_size, pattern, src_tp=int(src), dst_tp=int(dst))
        for model in models
        for page_size in args.page_size or [1]
        for pattern in patterns
    ]
    return shapes + [Shape(RAW, 1, pattern, raw_bytes=size) for size in args.raw or [] for pattern in patterns]


def _token_bytes(shape: Shape) -> tuple[int, int, int]:
    """Bytes of a token that move, and that it takes in the source and destination pools."""
    work = Workload(shape.model, 1, 1, "random", 1, shape.raw_bytes, shape.src_tp, shape.dst_tp)
    geometry = work.geometry()
    buffers = geometry.buffers
    return buffers * geometry.piece, buffers * geometry.src_token, buffers * geometry.dst_token


def _tokens(shape: Shape, transport: str, asked: int | None) -> int:
    if asked:
        tokens = asked
    else:
        target = TARGET.get(transport, TARGET_ELSE)
        most = max(1, target // _token_bytes(shape)[0])
        tokens = 1 << (most.bit_length() - 1)
        tokens = min(tokens, 1 << 18) if shape.model == RAW else max(tokens, 1024)
    return max(1, tokens // shape.page_size) * shape.page_size


@dataclass(frozen=True)
class Memory:
    """Bytes that each end may use. On one machine both take from `sender`, and `receiver` is None."""

    sender: int
    receiver: int | None = None

    def fits(self, source: int, target: int) -> bool:
        if self.receiver is None:
            return source + target <= self.sender * SHARE
        return source <= self.sender * SHARE and target <= self.receiver * SHARE


def workloads(
    args: argparse.Namespace, transports: Sequence[str], memory: Memory
) -> tuple[dict[str, list[Workload]], list[str]]:
    """The rows of each transport, fitted to the memory, and a note for whatever had to shrink.

    Rows of one model share a pool, so that it is made once.
    """
    shapes, notes = shapes_of(args), []
    families = dict.fromkeys((s.model, s.raw_bytes, s.src_tp, s.dst_tp) for s in shapes)
    out: dict[str, list[Workload]] = {transport: [] for transport in transports}
    for family in families:
        members = [s for s in shapes if (s.model, s.raw_bytes, s.src_tp, s.dst_tp) == family]
        wanted = {(t, s): _tokens(s, t, args.tokens) for t in transports for s in members}
        largest = max(wanted.values())
        most = POOL_FACTOR if args.memory == "host" else DEVICE_POOL_FACTOR
        factor, tokens = _fit(members[0], largest, memory, max(s.page_size for s in members), most)
        if (factor, tokens) != (most, largest):
            name = members[0].model if members[0].model != RAW else f"raw {members[0].raw_bytes}"
            less = f"{tokens} tokens instead of {largest}, " if tokens < largest else ""
            notes.append(f"{name}: {less}pools of {factor:g} times that, to fit the available memory")
        pool = shrunk(Workload(RAW, 1, 1, "random", 1), factor, tokens).pool_tokens
        unit = max(64, *(s.page_size for s in members))
        pool = -(-pool // unit) * unit
        for (transport, shape), count in wanted.items():
            count = max(1, min(count, tokens) // shape.page_size) * shape.page_size
            work = Workload(shape.model, shape.page_size, count, shape.pattern, pool, seed=args.seed)
            work = replace(work, raw_bytes=shape.raw_bytes, src_tp=shape.src_tp, dst_tp=shape.dst_tp)
            check(work)
            out[transport].append(work)
    return out, notes


def _fit(shape: Shape, tokens: int, memory: Memory, unit: int, most: float) -> tuple[float, int]:
    """The pool factor and the number of tokens that fit: smaller pools first, then fewer tokens."""
    moved, source, target = _token_bytes(shape)
    while True:
        for factor in (f for f in (POOL_FACTOR, 2.0, LEAST_FACTOR) if f <= most):
            # the pools, the content block of both ends (one buffer each, at most a pool), the ceiling's mapping
            pool = int(tokens * factor)
            extra = source * pool if shape.model == RAW else source * pool // 16
            if memory.fits(pool * source + extra, pool * target + extra + tokens * moved):
                return factor, tokens
        if tokens // 2 < unit:
            raise BenchError(f"not even {tokens} tokens of {shape.model} fit the available memory")
        tokens = tokens // 2 // unit * unit
