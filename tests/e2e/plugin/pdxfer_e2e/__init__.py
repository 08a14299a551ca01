"""Test-only SGLang plugin, loaded by the servers of tests/e2e. Each part is switched on by an environment variable.

PDXE2E_MLA=1        the torch_native attention backend takes the absorbed MLA path (its other one is broken on CPU)
PDXE2E_CHECKSUM=1   --disaggregation-enable-kv-checksum on CPU: Adler-32 of the same bytes, computed on the host
PDXE2E_PAGED=1       pages are given out without Triton, for SGLang before 0.5.22 with a page size above 1
PDXE2E_CONTROL=FILE the file's text breaks transfers: "drop" moves no KV page, "flip" damages one byte; empty: nothing
PDXE2E_EVENTS=FILE  one JSON line per event: a transfer began or ended, an ACK was sent, held pages were released
"""

import ctypes
import json
import os
import threading
import time
import zlib

_lock = threading.Lock()


def event(kind, **fields):
    path = os.environ.get("PDXE2E_EVENTS")
    if path:
        line = json.dumps({"t": time.time(), "pid": os.getpid(), "kind": kind, **fields})
        with _lock, open(path, "a") as file:
            file.write(line + "\n")


def _control():
    path = os.environ.get("PDXE2E_CONTROL")
    if not path or not os.path.exists(path):
        return ""
    with open(path) as file:
        return file.read().strip()


def _absorbed_mla():
    from sglang.srt.models.deepseek_common import attention_backend_handler as handler

    def choose(attention, forward_batch):
        return handler._dispatch_mla_subtype(attention, forward_batch)

    handler.AttentionBackendRegistry.register("torch_native", choose)


def _host_checksum():
    from sglang.srt.disaggregation import checksum

    def compute(self, pages, state=None):
        digest = 1
        for pointers, lengths, indices in (
            (self._kv_data_ptrs, self._kv_item_lens, pages),
            (self._state_data_ptrs, self._state_item_lens, state),
        ):
            for pointer, length in zip(pointers or (), lengths or (), strict=False):
                for index in indices.tolist():
                    digest = zlib.adler32(ctypes.string_at(pointer + index * length, length), digest)
        return digest or 1

    checksum.KvChecksumComputer.compute = compute


class _Extend:
    """Stands in for a Triton kernel: slots for tokens [prefix, length) of each request, new pages in order."""

    def __getitem__(self, grid):
        def run(prefix_lens, seq_lens, last_loc, free_pages, out, _, page_size):
            pages, slots = iter(free_pages.tolist()), []
            for prefix, length, last in zip(prefix_lens.tolist(), seq_lens.tolist(), last_loc.tolist(), strict=True):
                for position in range(prefix, length):
                    last = last + 1 if position % page_size else next(pages, 0) * page_size
                    slots.append(last)
            out.copy_(out.new_tensor(slots))

        return run


class _Decode:
    """Stands in for a Triton kernel: one slot for the last token of each request."""

    def __getitem__(self, grid):
        def run(seq_lens, last_loc, free_pages, out, _, page_size):
            ones = seq_lens - 1
            _Extend()[grid](ones, seq_lens, last_loc, free_pages, out, _, page_size)

        return run


def _host_pages():
    from sglang.srt.mem_cache.allocator import paged

    paged.alloc_extend_kernel, paged.alloc_decode_kernel = _Extend(), _Decode()


def _breakable_transfers():
    """Subclass the product's manager where it is looked up; its own code has no switch for being wrong."""
    from pdxfer.sglang import manager

    class BreakableManager(manager.PdxKVManager):
        def _give(self, session, part):
            mode = _control()
            if mode == "drop":
                event("dropped", pages=len(part.src_pages))
                return
            if mode == "flip" and len(part.src_pages):
                self._damaged = self.kv_args.kv_data_ptrs[0] + int(part.src_pages[0]) * self.kv_args.kv_item_lens[0] + 3
            super()._give(session, part)

        def _move(self, session, plan):
            chunk = self._work.chunk
            address, self._damaged = getattr(self, "_damaged", 0), 0
            byte = ctypes.c_ubyte.from_address(address) if address else None
            if byte is not None:
                byte.value ^= 0x41  # sign and exponent of a float: no rounding hides it
            event("move", room=chunk.room, bytes=plan.bytes)
            try:
                super()._move(session, plan)
            finally:
                if byte is not None:
                    byte.value ^= 0x41
                event("moved", room=chunk.room)

        def _send_abort_ack(self, room, target):
            event("ack", room=room)
            super()._send_abort_ack(room, target)

        def clear_deferred_abort_state(self, bootstrap_room):
            event("released", room=bootstrap_room)
            super().clear_deferred_abort_state(bootstrap_room)

        def register_deferred_abort_room(self, bootstrap_room):
            event("held", room=bootstrap_room)
            return super().register_deferred_abort_room(bootstrap_room)

    manager.PdxKVManager = BreakableManager


def activate():
    if os.environ.get("PDXE2E_MLA") == "1":
        _absorbed_mla()
    if os.environ.get("PDXE2E_CHECKSUM") == "1":
        _host_checksum()
    if os.environ.get("PDXE2E_PAGED") == "1":
        _host_pages()
    if os.environ.get("PDXE2E_CONTROL") or os.environ.get("PDXE2E_EVENTS"):
        _breakable_transfers()
