"""SGLang's control sockets to ranks that are gone.

A prefill rank keeps one PUSH socket and its monitor for every decode endpoint it ever spoke to. A decode server that
restarts listens on another port, so each restart would leave three descriptors behind for ever. A decode rank closes
its socket to a lost prefill rank, and then makes another to tell that rank that the failed requests are aborted: one
descriptor. The manager's watch thread names the endpoints of lost ranks here and has their sockets closed a little
later.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from typing import Any

from pdxfer.sglang import wire

# Threads that fetched a socket before its rank was lost have sent, or failed, by then: a send takes no time on a socket
# whose other end is gone.
CLOSE_AFTER_S = 5.0


class ControlSockets:
    """Which endpoints are gone, and when `close` is called with one. For one thread at a time, beside SGLang's own."""

    def __init__(self, close: Callable[[str], None]) -> None:
        self._close = close
        self._due: dict[str, float] = {}  # endpoint (`wire.endpoint_of`) -> when to close

    def retire(self, endpoint: str) -> None:
        """The rank behind `endpoint` is gone."""
        self._due[endpoint] = time.monotonic() + CLOSE_AFTER_S

    def close_due(self, in_use: Callable[[], Collection[str]]) -> None:
        """Close what was retired long enough ago, except endpoints `in_use` again; SGLang connects anew if it must."""
        now = time.monotonic()
        over = [endpoint for endpoint, due in self._due.items() if due <= now]
        if not over:
            return
        keep = in_use()
        for endpoint in over:
            del self._due[endpoint]
            if endpoint not in keep:
                self._close(endpoint)


def close_of_manager(manager: Any, endpoint: str) -> None:
    """Close a prefill rank's socket to the decode rank at `endpoint`. `manager`: its CommonKVManager."""
    if not hasattr(manager, "_socket_cache"):
        return  # an SGLang that keeps them elsewhere: they stay, as they would without us
    with manager._socket_lock:
        keys = [key for key in manager._socket_cache if _spelling(key) == endpoint]
        kept = [cache.pop(key, None) for key in keys for cache in (manager._socket_cache, manager._monitor_cache)]
        send_locks = [manager._socket_send_locks.pop(key, None) for key in keys]
    with contextlib.ExitStack() as stack:
        for lock in send_locks:
            if lock is not None:
                stack.enter_context(lock)
        for socket in kept:
            if socket is not None:
                socket.close(linger=0)


def close_of_receivers(receivers: Any, endpoint: str) -> None:
    """Close a decode rank's socket to the prefill rank at `endpoint`. `receivers`: a class of CommonKVReceiver."""
    if not hasattr(receivers, "_socket_cache") or not hasattr(receivers, "disconnect_endpoint"):
        return  # likewise
    with receivers._global_lock:
        keys = [key for key in receivers._socket_cache if _spelling(key) == endpoint]
    for key in keys:
        receivers.disconnect_endpoint(key)


def _spelling(key: str) -> str:
    """`wire.endpoint_of` of what SGLang's cache calls ``tcp://host:port``."""
    host, _, port = key.removeprefix("tcp://").rpartition(":")
    return wire.endpoint_of(host, port)
