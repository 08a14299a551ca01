"""What this plugin needs of SGLang: the versions it was built against, and a probe of what it overrides.

SGLang's disaggregation code changes with every release. The probe compares what `manager` overrides and calls with what
is installed, by name and by leading parameters, before a server starts: a change shows as one line that names it, not
as wrong tokens. Nothing here imports SGLang by itself.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

OLDEST, NEWEST = (0, 5, 17), (0, 5, 23)

# Overridden methods of MooncakeKVManager and the parameters they are called with, in order, after self.
# "?" before a name: the method may be missing (older SGLang has no such state or protocol step).
_OVERRIDDEN: dict[str, tuple[str, ...]] = {
    "init_engine": (),
    "register_buffer_to_engine": (),
    "deregister_buffer_to_engine": (),
    "get_session_id": (),
    "_transfer_data": ("mooncake_session_id", "transfer_blocks"),
    "_send_kvcache_generic": (
        "mooncake_session_id",
        "src_data_ptrs",
        "dst_data_ptrs",
        "item_lens",
        "prefill_data_indices",
        "dst_data_indices",
        "executor",
    ),
    "send_kvcache_slice": (
        "mooncake_session_id",
        "prefill_kv_indices",
        "dst_kv_ptrs",
        "dst_kv_indices",
        "dst_tp_rank",
        "dst_attn_tp_size",
        "dst_kv_item_len",
        "executor",
    ),
    "send_aux": ("req", "prefill_aux_index", "dst_aux_ptrs"),
    "send_aux_tcp": ("req", "prefill_aux_index", "dst_aux_ptrs"),  # called, where a link carries no host memory
    "transfer_worker": ("queue", "executor", "staging_buffer", "worker_index"),
    "record_failure": ("bootstrap_room", "failure_reason"),
    "update_status": ("bootstrap_room", "status"),
    "_handle_node_failure": ("failed_bootstrap_addr",),
    "?_send_swa_state_slice": ("req", "prefill_swa_page_indices"),
    "?poison_deferred_ack_room": ("room",),
    "?_poison_unsettled_send": ("room",),
    "?_maybe_ack_drained_abort": ("room",),
}
# One of these concludes a failed room and tells the decode side.
_CONCLUDE = ("conclude_failure", "sync_status_to_decode_endpoint")


def parse_version(text: str) -> tuple[int, int, int] | None:
    """The first three numbers of a version such as ``0.5.23`` or ``0.5.20.post1``; None when it is not one."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def version_note(text: str) -> tuple[bool, str]:
    """Whether to go on with an SGLang of this version, and a line for the user (empty: nothing to say)."""
    supported = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    version = parse_version(text)
    if version is None:
        return True, f"SGLang reports version {text!r}, not one of {supported}; its interface fits, so going on"
    if version < OLDEST:
        return False, f"SGLang {text} is too old: this pdxfer supports {supported}; install a supported version"
    if version > NEWEST:
        return True, f"SGLang {text} is newer than {supported}; its interface fits, so going on, but it is untested"
    return True, ""


def _parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def probe_manager(manager: type[Any]) -> list[str]:
    """What changed in SGLang's manager since this plugin was written: one text per difference, empty when it fits."""
    changes = []
    for key, wanted in _OVERRIDDEN.items():
        name, optional = key.lstrip("?"), key.startswith("?")
        function = getattr(manager, name, None)
        if function is None:
            if not optional:
                changes.append(f"{manager.__name__}.{name} is gone")
            continue
        have = _parameters(function)
        if have[: len(wanted)] != list(wanted):
            changes.append(
                f"{manager.__name__}.{name} takes ({', '.join(have)}); expected it to begin with ({', '.join(wanted)})"
            )
    if not any(hasattr(manager, name) for name in _CONCLUDE):
        changes.append(f"{manager.__name__} has none of {', '.join(_CONCLUDE)}")
    return changes
