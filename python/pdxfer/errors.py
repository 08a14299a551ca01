"""The errors of pdxfer. Each also derives from the builtin that code already catches.

`InvalidError` is a `ValueError`, `UnavailableError` a `RuntimeError`, `PeerLostError` a `ConnectionError`,
`TransferTimeout` a `TimeoutError`, `InternalError` and `CorruptionError` a `RuntimeError`. All carry `native`: the
errno or library code, 0 when there is none. The classes live in the native module, which raises them.
"""

from pdxfer._core import (
    CancelledError,
    CorruptionError,
    InternalError,
    InvalidError,
    PdxferError,
    PeerLostError,
    TransferTimeout,
    UnavailableError,
)

__all__ = [
    "CancelledError",
    "CorruptionError",
    "InternalError",
    "InvalidError",
    "PdxferError",
    "PeerLostError",
    "TransferTimeout",
    "UnavailableError",
]
