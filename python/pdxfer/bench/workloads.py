"""What is moved: real model shapes, page patterns, and which bytes of a page a rank sends.

Pure NumPy and deterministic: both ends build the same `Geometry` and the same page lists from a `Workload`, so only
the workload travels between them. Nothing here knows the engine.
"""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pdxfer.bench.errors import BenchError

Pages = npt.NDArray[np.int32]

PATTERNS = ("contiguous", "random", "busy-decode")
DTYPE_BYTES = 2  # bf16
RAW = "raw"
# Mean run of pages on a decode server whose pool is 90 % full (4k-token prompts, 300-token answers), by page size:
# simulated with SGLang's own allocator. The prefill side stays contiguous.
BUSY_DECODE_RUN = {1: 4.5, 16: 4.2, 64: 3.6}


@dataclass(frozen=True)
class Model:
    """Shape of a model's KV cache. `latent` is the MLA row in elements; 0 for models with K and V heads."""

    name: str
    layers: int
    kv_heads: int = 0
    head_dim: int = 0
    latent: int = 0

    @property
    def groups(self) -> int:
        """Buffers per layer: K and V, or one latent buffer."""
        return 1 if self.latent else 2

    def token_bytes(self, tp: int) -> int:
        """Bytes of one token in one buffer of one tensor-parallel rank (bf16)."""
        if self.latent:
            return self.latent * DTYPE_BYTES
        return self.kv_heads // tp * self.head_dim * DTYPE_BYTES


MODELS = (
    Model("Qwen2.5-7B", layers=28, kv_heads=4, head_dim=128),
    Model("Llama-3.1-8B", layers=32, kv_heads=8, head_dim=128),
    Model("Llama-3.1-70B", layers=80, kv_heads=8, head_dim=128),
    Model("Qwen3-30B", layers=48, kv_heads=4, head_dim=128),
    Model("Qwen3-235B", layers=94, kv_heads=4, head_dim=128),
    Model("DeepSeek-V3", layers=61, latent=576),
)


def find_model(name: str) -> Model:
    """The model of that name, whatever its case; a beginning that fits only one is enough.

    Raises:
        BenchError: none or several fit.
    """
    wanted = name.lower()
    exact = [m for m in MODELS if m.name.lower() == wanted]
    fits = exact or [m for m in MODELS if m.name.lower().startswith(wanted) or wanted.startswith(m.name.lower() + "-")]
    if len(fits) != 1:
        known = ", ".join(m.name for m in MODELS)
        raise BenchError(f"--model {name}: {'no such model' if not fits else 'fits several'}; known: {known}")
    return fits[0]


@dataclass(frozen=True)
class Geometry:
    """Where the bytes of a workload lie, on both sides. All sizes in bytes, all counts per buffer."""

    groups: int
    layers: int
    page_size: int
    pages: int
    src_token: int  # bytes of a token in a source buffer
    dst_token: int
    piece: int  # bytes of a token that move
    src_skip: int  # from a token's first byte to the piece
    dst_skip: int
    src_slots: int  # pages in a source buffer
    dst_slots: int
    heads: int = 0  # KV heads of the model; 0: pages are whole on every rank
    src_tp: int = 1
    dst_tp: int = 1

    @property
    def buffers(self) -> int:
        return self.groups * self.layers

    @property
    def whole(self) -> bool:
        """Do whole pages move?"""
        return self.piece == self.src_token == self.dst_token

    @property
    def bytes(self) -> int:
        return self.buffers * self.pages * self.page_size * self.piece

    @property
    def src_buffer(self) -> int:
        return self.src_slots * self.page_size * self.src_token

    @property
    def dst_buffer(self) -> int:
        return self.dst_slots * self.page_size * self.dst_token


@dataclass(frozen=True)
class Workload:
    """One row of the bench, as it travels to the other end.

    Args:
        model: a name of `MODELS`, or "raw".
        raw_bytes: block size when raw; a block counts as a page of one token.
        tokens: tokens (raw: blocks) that move; a multiple of page_size.
        src_tp, dst_tp: tensor-parallel sizes. One rank sends, the last of its side, to the last of the other.
        pool_tokens: tokens in each side's pool, at least `tokens`.
    """

    model: str
    page_size: int
    tokens: int
    pattern: str
    pool_tokens: int
    raw_bytes: int = 0
    src_tp: int = 1
    dst_tp: int = 1
    seed: int = 1

    @property
    def tp(self) -> str:
        return f"{self.src_tp}:{self.dst_tp}"

    @property
    def label(self) -> str:
        """Short name for tables and plots."""
        if self.model == RAW:
            return f"raw {size_text(self.raw_bytes)} {self.pattern}"
        tp = "" if self.src_tp == self.dst_tp == 1 else f" TP {self.tp}"
        return f"{self.model} p{self.page_size} {self.pattern}{tp}"

    @property
    def pool_key(self) -> tuple[Any, ...]:
        """Workloads with the same key run in the same pools."""
        return (self.model, self.raw_bytes, self.src_tp, self.dst_tp, self.pool_tokens)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def geometry(self) -> Geometry:
        """Sizes and offsets on both sides.

        Raises:
            BenchError: the workload contradicts itself.
        """
        check(self)
        sizes = {
            "page_size": self.page_size,
            "pages": self.tokens // self.page_size,
            "src_slots": self.pool_tokens // self.page_size,
            "dst_slots": self.pool_tokens // self.page_size,
        }
        if self.model == RAW:
            raw = self.raw_bytes
            return Geometry(1, 1, src_token=raw, dst_token=raw, piece=raw, src_skip=0, dst_skip=0, **sizes)
        model = find_model(self.model)
        src, dst = model.token_bytes(self.src_tp), model.token_bytes(self.dst_tp)
        piece = min(src, dst)  # the last ranks of both sides: their common heads are the last ones
        return Geometry(
            model.groups,
            model.layers,
            src_token=src,
            dst_token=dst,
            piece=piece,
            src_skip=src - piece,
            dst_skip=dst - piece,
            heads=model.kv_heads,
            src_tp=self.src_tp,
            dst_tp=self.dst_tp,
            **sizes,
        )


def workload_from_json(fields: dict[str, Any]) -> Workload:
    """The workload that `to_json` described; unknown or missing fields are an error of the peer's."""
    try:
        return Workload(**fields)
    except TypeError as error:
        raise BenchError(f"the other end sent a workload that this version does not know: {error}") from None


def check(work: Workload) -> None:
    """Raises BenchError when no transfer can be made of it."""
    if work.pattern not in PATTERNS:
        raise BenchError(f"--pattern {work.pattern}: expected {', '.join(PATTERNS)}")
    if work.page_size < 1 or work.tokens < 1 or work.tokens % work.page_size or work.pool_tokens < work.tokens:
        raise BenchError(
            f"{work.tokens} tokens in a pool of {work.pool_tokens} at page size {work.page_size}: tokens must be a "
            "positive multiple of the page size and fit the pool"
        )
    if work.model == RAW:
        if work.raw_bytes < 1 or work.page_size != 1 or work.tp != "1:1":
            raise BenchError(f"--raw {work.raw_bytes}: a positive block size, with page size 1 and no --tp")
        return
    model = find_model(work.model)
    for tp in (work.src_tp, work.dst_tp):
        if tp < 1 or (not model.latent and (tp > model.kv_heads or model.kv_heads % tp)):
            raise BenchError(f"--tp {work.tp}: {model.name} has {model.kv_heads} KV heads; give divisors of that")


def make_pages(work: Workload) -> tuple[Pages, Pages]:
    """Source and destination page numbers, int32, one entry per page; deterministic in the workload."""
    geometry = work.geometry()
    pages, src_slots, dst_slots = geometry.pages, geometry.src_slots, geometry.dst_slots
    rng = np.random.default_rng(work.seed)
    if work.pattern == "random":
        return (
            rng.permutation(src_slots)[:pages].astype(np.int32),
            rng.permutation(dst_slots)[:pages].astype(np.int32),
        )
    src_first, dst_first = (src_slots - pages) // 2, (dst_slots - pages) // 3
    src = np.arange(src_first, src_first + pages, dtype=np.int32)
    if work.pattern == "contiguous":
        return src, np.arange(dst_first, dst_first + pages, dtype=np.int32)
    return src, _scattered_runs(rng, pages, dst_slots, busy_run(work.page_size))


def busy_run(page_size: int) -> float:
    """Mean run in pages of a busy decode server; between the simulated page sizes, by the logarithm of the size."""
    known = sorted(BUSY_DECODE_RUN)
    return float(np.interp(np.log2(page_size), np.log2(known), [BUSY_DECODE_RUN[size] for size in known]))


def _scattered_runs(rng: np.random.Generator, pages: int, slots: int, mean: float) -> Pages:
    """Ascending pages in runs of geometric length, at least one unused page between two runs where the pool allows."""
    lengths = rng.geometric(1 / mean, size=pages)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), pages)) + 1]
    lengths[-1] -= int(lengths.sum()) - pages
    free = slots - pages
    if len(lengths) > free + 1:  # a pool with hardly a free page cannot be fragmented more than this
        ends = np.linspace(0, pages, free + 2).astype(np.int64)
        lengths = ends[1:] - ends[:-1]
    runs = len(lengths)
    gaps = rng.multinomial(free - (runs - 1), np.full(runs + 1, 1 / (runs + 1)))
    gaps[1:runs] += 1
    firsts = np.cumsum(gaps[:runs]) + np.concatenate(([0], np.cumsum(lengths[:-1])))
    within = np.arange(pages) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return (np.repeat(firsts, lengths) + within).astype(np.int32)


class Runs(NamedTuple):
    """Pages that are consecutive on both sides, joined: run i is `pages[i]` pages from `src[i]` and `dst[i]`."""

    src: npt.NDArray[np.int64]
    dst: npt.NDArray[np.int64]
    pages: npt.NDArray[np.int64]


def joint_runs(src: Pages, dst: Pages) -> Runs:
    """The fewest runs that cover the page lists in order; an empty list has none."""
    if not len(src):
        none = np.empty(0, dtype=np.int64)
        return Runs(none, none, none)
    breaks = np.flatnonzero((np.diff(src) != 1) | (np.diff(dst) != 1)) + 1
    firsts = np.concatenate(([0], breaks))
    counts = np.diff(np.concatenate((firsts, [len(src)])))
    return Runs(src[firsts].astype(np.int64), dst[firsts].astype(np.int64), counts)


def pages_digest(src: Pages, dst: Pages) -> int:
    """Equal on both ends exactly when their page lists are (CRC-32)."""
    return zlib.crc32(dst.tobytes(), zlib.crc32(src.tobytes()))


def shrunk(work: Workload, pool_factor: float, tokens: int) -> Workload:
    """The same workload with fewer tokens or a smaller pool."""
    unit = max(64, work.page_size)
    tokens = max(work.page_size, tokens // work.page_size * work.page_size)
    return replace(work, tokens=tokens, pool_tokens=-(-int(tokens * pool_factor) // unit) * unit)


def size_text(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
