"""Every byte that a prefill rank sends: SGLang's sending methods, replaced by factorised plans.

A mixin in front of SGLang's Mooncake manager, so that `super()` is SGLang's own method. Runs on transfer worker
threads. int32 page arrays go to native code whole; what a plan multiplies them with is built once per decode rank and
component by running SGLang's method on one page with a `Probe` (see `pairing`). The parts of a request's last chunk
leave in one batch with its metadata row.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import pdxfer
from pdxfer.sglang import pairing
from pdxfer.sglang.memory import MemoryTable, locate
from pdxfer.sglang.pairing import ONE_PAGE, Heads, Part, Probe

if TYPE_CHECKING:
    from pdxfer.sglang.links import PeerLinks

logger = logging.getLogger(__name__)

WAIT_S = 0.2  # how often a waiting worker looks whether its room was aborted
SETTLE_S = 10.0  # bound of waiting for a cancelled batch to stop


class TransferEnded(Exception):
    """A chunk's transfer ended without success. `cause` is None when its room had been aborted or cleared."""

    def __init__(self, session: str, cause: Exception | None) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}" if cause is not None else "the request was aborted")
        self.session = session
        self.cause = cause


class Work(threading.local):
    """What a worker thread is doing."""

    chunk: Any = None
    settled = False  # is nothing of the chunk's room that this worker sent still being written?
    cause = ""  # begins the reason of failures recorded on this thread

    def __init__(self) -> None:
        self.pending: dict[str, list[Part]] = {}

    def begin(self, chunk: Any) -> None:
        """A chunk was taken from the queue; None: the worker was told to stop."""
        self.chunk = chunk
        self.pending = {}
        self.settled = True


if TYPE_CHECKING:

    class _Sglang:
        """What stands behind the mixin: SGLang's manager, as far as it is called here."""

        kv_args: Any
        attn_tp_size: int
        decode_kv_args_table: dict[str, Any]

        def is_over(self, room: int) -> bool: ...
        def _send_kvcache_generic(self, *args: Any, **kwargs: Any) -> int: ...
        def send_kvcache_slice(self, *args: Any, **kwargs: Any) -> int: ...
        def _send_swa_state_slice(self, *args: Any, **kwargs: Any) -> int: ...
        def send_aux_tcp(self, req: Any, prefill_aux_index: int, dst_aux_ptrs: Sequence[int]) -> int: ...
else:
    _Sglang = object


class DataPath(_Sglang):
    """The byte-moving half of `manager.PdxKVManager`, which sets these attributes."""

    _pdx: pdxfer.Engine
    _memory: MemoryTable
    _links: PeerLinks
    _work: Work
    _transfer_s: float
    _on_gpu: bool

    def _move(self, session: str, plan: Any) -> None:
        """Move a plan and return when its bytes are visible. Raises TransferEnded when they will not be."""
        chunk = self._work.chunk
        try:
            batch = self._pdx.submit(self._links.get(session), plan)
            deadline = time.monotonic() + self._transfer_s
            while not batch.poll():
                try:
                    batch.wait(WAIT_S)
                    return
                except pdxfer.TransferTimeout:
                    late = time.monotonic() > deadline
                    if not late and (chunk is None or not self.is_over(chunk.room)):
                        continue
                self._settle(batch)
                if late:
                    raise pdxfer.TransferTimeout(f"{plan!r} was not done after {self._transfer_s:.0f} s")
                raise TransferEnded(session, None)
            batch.wait(0.0)
        except pdxfer.PdxferError as error:
            raise TransferEnded(session, error) from error

    def _settle(self, batch: Any) -> None:
        """Cancel a batch and wait until nothing more of it can land; if that cannot be known, say so."""
        self._pdx.cancel(batch)
        try:
            batch.wait(SETTLE_S)
        except pdxfer.PdxferError as error:
            logger.debug("pdxfer: cancelled a batch: %s", error)
        if not batch.poll():
            self._work.settled = False
            logger.error("pdxfer: a cancelled batch did not stop within %.0f s; its pages stay reserved", SETTLE_S)

    def _give(self, session: str, part: Part) -> None:
        """Move one component, or keep it for the metadata row's batch when the chunk is a request's last."""
        if self._work.chunk is not None and self._work.chunk.is_last_chunk:
            self._work.pending.setdefault(str(session), []).append(part)
        else:
            self._move(session, pdxfer.make_plan(parts=[part]))

    def _pairing(self, session: str, key: tuple[Any, ...], build: Callable[[Callable[..., Any]], Any]) -> Any:
        """A pairing of this rank and a decode rank, built once per registration and component."""
        info = self.decode_kv_args_table[str(session)]
        known = info.__dict__.setdefault("_pdxfer_pairings", {})
        key = (self._memory.generation, *key)
        if key not in known:
            try:
                peer = self._links.get(session)
                known[key] = build(lambda pointer, length: peer.find_region(pointer, length, 1.0))
            except (pdxfer.PdxferError, RuntimeError, ValueError) as error:
                raise TransferEnded(session, error) from error
        return known[key]

    def _send_kvcache_generic(
        self,
        mooncake_session_id: str,
        src_data_ptrs: list[int],
        dst_data_ptrs: list[int],
        item_lens: list[int],
        prefill_data_indices: Any,
        dst_data_indices: Any,
        executor: Any,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Whole pages: KV of equal attention TP, MLA, and page-indexed state."""
        base = super()._send_kvcache_generic
        if isinstance(mooncake_session_id, Probe):
            return int(
                base(
                    mooncake_session_id,
                    src_data_ptrs,
                    dst_data_ptrs,
                    item_lens,
                    prefill_data_indices,
                    dst_data_indices,
                    executor,
                    *args,
                    **kwargs,
                )
            )
        if len(prefill_data_indices) == 0:
            return 0
        on_device = kwargs.get("dst_device_data_indices")
        device_ptrs = np.array(sorted(kwargs.get("dst_device_data_ptrs") or ()), dtype=np.int64)
        single = dict(kwargs, dst_device_data_indices=ONE_PAGE) if on_device is not None else kwargs

        def build(remote: Callable[..., Any]) -> tuple[int, Any, Any]:
            probe = Probe(mooncake_session_id)
            code = base(probe, src_data_ptrs, dst_data_ptrs, item_lens, ONE_PAGE, ONE_PAGE, executor, *args, **single)
            rows = probe.rows()
            other = np.isin(rows[:, 1], device_ptrs)
            tables = (rows[~other], rows[other])
            found = [pairing.whole_pages(self._pdx.find_region, remote, t) if len(t) else None for t in tables]
            return int(code), found[0], found[1]

        key = ("pages", kwargs.get("state_type"), tuple(src_data_ptrs), tuple(dst_data_ptrs), tuple(device_ptrs))
        code, host_side, device_side = self._pairing(mooncake_session_id, key, build)
        if code == 0:
            for found, pages in ((host_side, dst_data_indices), (device_side, on_device)):
                if found is not None:
                    # KV pages are a request's own; rows of state may be shared or padded, as SGLang lists them.
                    part = _part(found, prefill_data_indices, pages)
                    self._give(
                        mooncake_session_id, part._replace(allow_duplicates=kwargs.get("state_type") is not None)
                    )
        return int(code)

    def send_kvcache_slice(
        self,
        mooncake_session_id: str,
        prefill_kv_indices: Any,
        dst_kv_ptrs: list[int],
        dst_kv_indices: Any,
        dst_tp_rank: int,
        dst_attn_tp_size: int,
        dst_kv_item_len: int,
        executor: Any,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """KV of unequal attention TP: the heads that both ranks hold, token by token inside each page."""
        if len(prefill_kv_indices) == 0:
            return 0
        base = super().send_kvcache_slice

        def probed(probe: Probe) -> int:
            return int(
                base(
                    probe,
                    ONE_PAGE,
                    dst_kv_ptrs,
                    ONE_PAGE,
                    dst_tp_rank,
                    dst_attn_tp_size,
                    dst_kv_item_len,
                    executor,
                    *args,
                    **kwargs,
                )
            )

        return self._send_slices(
            mooncake_session_id,
            probed,
            "heads",
            (self.kv_args.kv_data_ptrs, self.kv_args.kv_item_lens),
            (dst_kv_ptrs, [dst_kv_item_len] * len(dst_kv_ptrs)),
            self._heads(dst_attn_tp_size, dst_tp_rank),
            (prefill_kv_indices, dst_kv_indices),
        )

    def _send_swa_state_slice(self, req: Any, prefill_swa_page_indices: Any, *args: Any, **kwargs: Any) -> int:
        """A sliding-window cache of unequal attention TP. SGLang 0.5.22 and newer passes everything by keyword."""
        if len(prefill_swa_page_indices) == 0:
            return 0
        base = super()._send_swa_state_slice
        pages = kwargs["dst_swa_page_indices"]

        def probed(probe: Probe) -> int:
            one = dict(kwargs, dst_swa_page_indices=[0])
            return int(base(dataclasses.replace(req, mooncake_session_id=probe), [0], *args, **one))

        return self._send_slices(
            req.mooncake_session_id,
            probed,
            "swa",
            (kwargs["src_state_data_ptrs"], kwargs["src_state_item_lens"]),
            (kwargs["dst_state_data_ptrs"], kwargs["dst_state_item_lens"]),
            self._heads(kwargs["dst_attn_tp_size"], kwargs["dst_tp_rank"]),
            (prefill_swa_page_indices, pages),
        )

    def _heads(self, dst_tp: int, dst_rank: int) -> Heads:
        total = getattr(self.kv_args, "total_kv_head_num", 0) or self.kv_args.kv_head_num * self.attn_tp_size
        return Heads(
            total=total,
            page_size=self.kv_args.page_size,
            src_tp=self.attn_tp_size,
            src_rank=self.kv_args.engine_rank % self.attn_tp_size,
            dst_tp=dst_tp,
            dst_rank=dst_rank % dst_tp,
        )

    def _send_slices(
        self,
        session: str,
        probed: Callable[[Probe], int],
        kind: str,
        src: tuple[Sequence[int], Sequence[int]],
        dst: tuple[Sequence[int], Sequence[int]],
        heads: Heads,
        pages: tuple[Any, Any],
    ) -> int:
        def build(remote: Callable[..., Any]) -> tuple[int, Any]:
            probe = Probe(session)
            code = probed(probe)
            if code != 0:
                return code, None
            return 0, pairing.head_slices(self._pdx.find_region, remote, probe.rows(), src, dst, heads)

        code, found = self._pairing(session, (kind, tuple(src[0]), tuple(dst[0]), heads), build)
        # A rank that only repeats another rank's heads stays silent but concludes: the decode side counts ranks.
        if code == 0 and not found.redundant:
            self._give(session, _part(found, *pages))
        return int(code)

    def send_aux(self, req: Any, prefill_aux_index: int, dst_aux_ptrs: list[int]) -> int:
        """The metadata row, in one batch with what is left of the request: one round trip ends a transfer.

        The row lies in pageable host memory. Over a link that does not carry that, it follows what is left over
        SGLang's control socket, before the Success that the same socket carries.
        """
        session = req.mooncake_session_id
        lengths = self.kv_args.aux_item_lens

        def build(remote: Callable[..., Any]) -> Any:
            if self._on_gpu and not self._reaches_host(session, dst_aux_ptrs):
                return None
            # As SGLang: buffers pair by position, up to the shorter list.
            triples = zip(self.kv_args.aux_data_ptrs, dst_aux_ptrs, lengths, strict=False)
            rows = np.array([row for row in triples if row[2] > 0], dtype=np.int64).reshape(-1, 3)
            return pairing.whole_pages(self._pdx.find_region, remote, rows)

        found = self._pairing(session, ("aux", tuple(dst_aux_ptrs)), build)
        parts = self._work.pending.pop(str(session), [])
        if found is not None:
            parts.append(_part(found, [prefill_aux_index], [req.dst_aux_index]))
        if parts:
            self._move(session, pdxfer.make_plan(parts=parts))
        return 0 if found is not None else int(self.send_aux_tcp(req, prefill_aux_index, dst_aux_ptrs))

    def _reaches_host(self, session: str, dst_aux_ptrs: Sequence[int]) -> bool:
        """Does the link carry the decode rank's metadata rows? Its regions of a session are published together."""
        peer = self._links.get(session)
        for pointer in self.decode_kv_args_table[str(session)].dst_kv_ptrs[:1]:
            peer.find_region(pointer, 1, 1.0)  # waits for regions that are on their way
        first = next((p for p, n in zip(dst_aux_ptrs, self.kv_args.aux_item_lens, strict=False) if n > 0), None)
        return first is None or any(r.pointer <= first < r.pointer + r.bytes for r in peer.regions)

    def _transfer_data(self, mooncake_session_id: str, transfer_blocks: Sequence[tuple[int, int, int]]) -> int:
        """Components without a factorised form: a recurrent state slot, a tail row. A few rows per request."""
        if isinstance(mooncake_session_id, Probe):
            mooncake_session_id.collect(transfer_blocks)
        elif transfer_blocks:
            src, dst, lengths = zip(*transfer_blocks, strict=True)
            self._send_lists(mooncake_session_id, src, dst, lengths)
        return 0

    def _send_lists(self, session: str, src: Sequence[int], dst: Sequence[int], lengths: Sequence[int]) -> None:
        columns = [np.asarray(column, dtype=np.int64) for column in (src, dst, lengths)]
        try:
            peer = self._links.get(session)
            peer.find_region(int(columns[1][0]), int(columns[2][0]), 1.0)  # waits for a region that is on its way
            src_ids, src_offsets = locate(self._memory.regions(), columns[0], columns[2], "this rank")
            dst_ids, dst_offsets = locate(peer.regions, columns[1], columns[2], f"decode engine {session}")
        except (pdxfer.PdxferError, ValueError) as error:
            raise TransferEnded(session, error) from error
        self._move(session, pdxfer.layout.plan_from_extents(src_ids, src_offsets, dst_ids, dst_offsets, columns[2]))


def _part(found: Any, src_pages: Any, dst_pages: Any) -> Part:
    return Part(found, np.asarray(src_pages, dtype=np.int32), np.asarray(dst_pages, dtype=np.int32))
