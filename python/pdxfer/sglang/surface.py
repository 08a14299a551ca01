"""What SGLang's Mooncake manager asks of its engine, over a pdxfer.Engine.

This small surface has not changed since SGLang 0.5.2. Registration and the session id always come through it; bytes
only for the rare components that have no factorised form (a recurrent state slot, a tail row), a few rows per request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pdxfer
from pdxfer.sglang.memory import MemoryTable
from pdxfer.sglang.pairing import Probe

Lists = Callable[[str, Sequence[int], Sequence[int], Sequence[int]], None]


class EngineSurface:
    """The engine attribute of a manager.

    Args:
        session_id: address of the pdxfer engine.
        memory: where registered memory is kept.
        send_lists: moves (session, source addresses, destination addresses, lengths) and returns when they are visible.
        reach: connects to a session or raises pdxfer.PdxferError.
    """

    def __init__(self, session_id: str, memory: MemoryTable, send_lists: Lists, reach: Callable[[str], object]) -> None:
        self._session_id = session_id
        self._memory = memory
        self._send_lists = send_lists
        self._reach = reach

    def get_session_id(self) -> str:
        return self._session_id

    def batch_register(self, ptrs: Sequence[int], lengths: Sequence[int]) -> int:
        self._memory.add(ptrs, lengths)
        return 0

    def batch_deregister(self, ptrs: Sequence[int]) -> int:
        self._memory.remove(ptrs)
        return 0

    def batch_transfer_sync(
        self, session_id: str, buffers: Sequence[int], peer_buffer_addresses: Sequence[int], lengths: Sequence[int]
    ) -> int:
        if isinstance(session_id, Probe):
            session_id.collect(zip(buffers, peer_buffer_addresses, lengths, strict=True))
        elif len(lengths) > 0:
            self._send_lists(session_id, buffers, peer_buffer_addresses, lengths)
        return 0

    def send_probe(self, session_id: str) -> int:
        """0 when the session's engine can be reached, -1 when not."""
        try:
            self._reach(session_id)
        except pdxfer.PdxferError:
            return -1
        return 0
