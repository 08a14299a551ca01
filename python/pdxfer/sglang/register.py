"""Entry point of the plugin, and the only file that touches SGLang's tables.

SGLang calls `register` once in every process that loads plugins (main, schedulers, detokenizer), before arguments are
parsed. It swallows whatever a plugin raises, so trouble is printed to stderr here, with what changed and what to do;
without the registration the server then stops at "invalid choice: 'pdxfer'".
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from typing import Any

from pdxfer.sglang import interface

NAME = "pdxfer"
_APP = "pdxfer.sglang.app:app"
_SGLANG_APP = "sglang.srt.entrypoints.http_server:app"
_registered = False


class SglangChangedError(RuntimeError):
    """SGLang is not as this plugin knows it; the text names the differences and the next step."""


def _say(text: str) -> None:
    print(f"pdxfer: {text}", file=sys.stderr, flush=True)


def _asked_for() -> bool:
    """Does this process's command line name the backend? Then trouble is worth finding before the model loads."""
    return any(NAME in argument for argument in sys.argv[1:])


def _sglang_version() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # a source tree on PYTHONPATH; the probe decides


def _add_choice() -> None:
    from sglang.srt import server_args

    add = server_args.add_disagg_transfer_backend_choices
    # The list that add() extends: since 0.5.20 add is its own extend, before that both are names of one module.
    have = getattr(add, "__self__", None) or getattr(server_args, "DISAGG_TRANSFER_BACKEND_CHOICES", None)
    if not isinstance(have, list):
        raise SglangChangedError(_changed_text(["the list of transfer backends is not in sglang.srt.server_args"]))
    if NAME not in have:
        add([NAME])  # a list: a bare string would be taken letter by letter


def _extend_enum(enum: type[Any], name: str, value: str) -> Any:
    """Add a member to an Enum that exists, in place, so that every reference to the class sees it."""
    known = enum._value2member_map_
    if value in known:
        return known[value]
    member = object.__new__(enum)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[value] = member
    type.__setattr__(enum, name, member)  # EnumMeta refuses
    if enum(value) is not member:
        raise SglangChangedError(_changed_text([f"{enum.__name__}({value!r}) does not find an added member"]))
    return member


def _kv_classes(original: Callable[..., Any]) -> dict[str, Any]:
    """The classes by the name of SGLang's KVClassType. Raises SglangChangedError."""
    from sglang.srt.disaggregation.mooncake import conn

    changes = interface.probe_manager(conn.MooncakeKVManager)
    if changes:
        raise SglangChangedError(_changed_text(changes))
    from pdxfer.sglang.bootstrap import PdxKVBootstrapServer
    from pdxfer.sglang.manager import PdxKVManager
    from pdxfer.sglang.receiver import PdxKVReceiver
    from pdxfer.sglang.sender import PdxKVSender

    return {
        "MANAGER": PdxKVManager,
        "SENDER": PdxKVSender,
        "RECEIVER": PdxKVReceiver,
        "BOOTSTRAP_SERVER": PdxKVBootstrapServer,
    }


def _changed_text(changes: list[str]) -> str:
    return (
        f"SGLang {_sglang_version()} is not as this pdxfer knows it: {'; '.join(changes)}. Install SGLang "
        f"{'.'.join(map(str, interface.OLDEST))} to {'.'.join(map(str, interface.NEWEST))}, or a newer pdxfer; until "
        "then use another --disaggregation-transfer-backend"
    )


def _hook_classes() -> None:
    from sglang.srt.disaggregation import utils
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    member = _extend_enum(utils.TransferBackend, NAME.upper(), NAME)

    def get_kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
        if transfer_backend is not member:
            return original(transfer_backend, class_type)
        found = _kv_classes(original).get(class_type.name)
        return found if found is not None else original(utils.TransferBackend.MOONCAKE, class_type)

    HookRegistry.register("sglang.srt.disaggregation.utils.get_kv_class", get_kv_class, HookType.AROUND)


def _serve_tokenizer_workers() -> None:
    """Make tokenizer workers import an application that loads plugins first."""
    from sglang.srt.environ import envs

    if hasattr(envs, "SGLANG_HTTP_SERVER_APP_PATH"):  # 0.5.23
        os.environ.setdefault("SGLANG_HTTP_SERVER_APP_PATH", _APP)
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def run(original: Callable[..., Any], app: Any, *args: Any, **kwargs: Any) -> Any:
        return original(_APP if app == _SGLANG_APP else app, *args, **kwargs)

    HookRegistry.register("uvicorn.run", run, HookType.AROUND)


def _register() -> None:
    version = _sglang_version()
    go_on, note = interface.version_note(version)
    if not go_on:
        _say(note)
        return
    if note or _asked_for():
        from sglang.srt.disaggregation.mooncake import conn

        changes = interface.probe_manager(conn.MooncakeKVManager)
        if changes:
            raise SglangChangedError(_changed_text(changes))
    if note:
        _say(note)
    _add_choice()
    _hook_classes()
    _serve_tokenizer_workers()


def register() -> None:
    """Add ``pdxfer`` to SGLang's transfer backends. Idempotent; never raises, prints what is wrong instead."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        _register()
    except SglangChangedError as error:
        _say(str(error))
    except Exception as error:  # SGLang would only log it, and the server stop with "invalid choice"
        _say(_changed_text([f"{type(error).__name__}: {error}"]))
