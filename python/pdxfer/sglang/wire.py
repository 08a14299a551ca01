"""The one message of our own: a prefill rank introduces itself to a decode engine it connects to.

It travels as the tail of an empty tagged batch, so it is ordered, authenticated and versioned by the engine. The decode
side learns from it which engine peer belongs to which prefill rank, and can fail that rank's requests the moment the
engine loses the peer instead of waiting for missed heartbeats.
"""

from __future__ import annotations

import json

HELLO_TAG = 0x7064_7866_6572_0001  # "pdxfer", message 1
_VERSION = 1
_LIMIT = 4096


def encode_hello(endpoint: str) -> bytes:
    """The tail of a hello. `endpoint` is ``ip:port`` of the prefill rank's control socket."""
    return json.dumps({"v": _VERSION, "endpoint": endpoint}).encode()


def decode_hello(tail: bytes) -> str | None:
    """The endpoint in a hello; None when the bytes are not one that this version reads."""
    if len(tail) > _LIMIT:
        return None
    try:
        message = json.loads(tail)
    except ValueError:
        return None
    if not isinstance(message, dict) or message.get("v") != _VERSION:
        return None
    endpoint = message.get("endpoint")
    return endpoint if isinstance(endpoint, str) and ":" in endpoint else None


def endpoint_of(ip: object, port: object) -> str:
    """One spelling of an ip and a port for both ends: SGLang has them as text, numbers and with or without brackets."""
    return f"{str(ip).strip('[]')}:{port}"
