"""Registration with a stand-in SGLang: choice, enum, classes, tokenizer workers; and how trouble is told."""

from __future__ import annotations

import copy
import importlib
import os
import pickle
import sys
from typing import Any

import fake_sglang
import pytest

VERSION = "0.5.23"


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, fresh, with a stand-in SGLang of the version in `register.version`."""

    def load(version: str = VERSION, argv: tuple[str, ...] = (), **options: Any) -> Any:
        sglang = fake_sglang.install(monkeypatch, **options)
        module = importlib.import_module("pdxfer.sglang.register")

        monkeypatch.setattr(module, "_sglang_version", lambda: version)
        monkeypatch.setattr(sys, "argv", ["sglang", *argv])
        monkeypatch.delenv("SGLANG_HTTP_SERVER_APP_PATH", raising=False)
        return module, sglang

    return load


@pytest.mark.parametrize("adder_is_extend", [True, False])
def test_choice_enum_and_classes(register: Any, adder_is_extend: bool) -> None:
    module, sglang = register(adder_is_extend=adder_is_extend)
    module.register()
    module.register()
    assert sglang.choices == ["mooncake", "pdxfer"]
    member = sglang.backend("pdxfer")
    assert member is sglang.backend.PDXFER is sglang.backend["PDXFER"]
    assert list(sglang.backend) == [sglang.backend.MOONCAKE, member]
    assert copy.deepcopy(member) is member and hash(member) is not None
    hook = sglang.hooks["sglang.srt.disaggregation.utils.get_kv_class"]
    kinds = fake_sglang.KVClassType
    names = {kind: getattr(hook(fake_sglang.get_kv_class, member, kind), "__name__", None) for kind in kinds}
    assert names[kinds.MANAGER] == "PdxKVManager"
    assert names[kinds.SENDER] == "PdxKVSender"
    assert names[kinds.RECEIVER] == "PdxKVReceiver"
    assert names[kinds.BOOTSTRAP_SERVER] == "PdxKVBootstrapServer"
    assert hook(fake_sglang.get_kv_class, member, kinds.KVARGS) == "sglang's mooncake KVARGS"
    assert hook(fake_sglang.get_kv_class, sglang.backend.MOONCAKE, kinds.MANAGER) == "sglang's mooncake MANAGER"


def test_a_member_added_in_place_survives_pickling(register: Any) -> None:
    module, _ = register()
    member = module._extend_enum(fake_sglang.TransferBackend, "PDXFER", "pdxfer")
    assert pickle.loads(pickle.dumps(member)) is member
    assert module._extend_enum(fake_sglang.TransferBackend, "PDXFER", "pdxfer") is member


def test_tokenizer_workers(register: Any) -> None:
    module, sglang = register()
    module.register()
    assert os.environ["SGLANG_HTTP_SERVER_APP_PATH"] == "pdxfer.sglang.app:app"
    assert "uvicorn.run" not in sglang.hooks


def test_tokenizer_workers_before_the_variable_existed(register: Any) -> None:
    module, sglang = register("0.5.17", app_path=False)
    module.register()
    ran: list[Any] = []
    run = sglang.hooks["uvicorn.run"]
    run(lambda *args, **kwargs: ran.append((args, kwargs)), "sglang.srt.entrypoints.http_server:app", workers=2)
    run(lambda *args, **kwargs: ran.append((args, kwargs)), "other:app")
    assert ran == [(("pdxfer.sglang.app:app",), {"workers": 2}), (("other:app",), {})]


def test_an_old_sglang_gets_one_line(register: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module, sglang = register("0.5.16")
    module.register()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "0.5.16 is too old" in error
    assert sglang.choices == ["mooncake"]


def test_a_newer_sglang_that_fits_goes_on_with_one_line(register: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module, sglang = register("0.5.99")
    module.register()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "newer" in error
    assert "pdxfer" in sglang.choices


@pytest.mark.parametrize("version", ["0.5.23", "0.5.99"])
def test_a_changed_interface_is_told_before_the_model_loads(
    register: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    module, sglang = register(version, argv=("--disaggregation-transfer-backend", "pdxfer"))
    changed = type("MooncakeKVManager", (fake_sglang.MooncakeKVManager,), {"send_aux": lambda self, row: 0})
    monkeypatch.setattr(sglang.conn, "MooncakeKVManager", changed)
    module.register()
    error = capsys.readouterr().err
    assert "send_aux takes (row)" in error and "Install SGLang 0.5.17 to 0.5.23" in error
    assert sglang.choices == ["mooncake"]


def test_missing_tables_are_told(
    register: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, sglang = register()
    monkeypatch.delattr(sglang.server_args, "add_disagg_transfer_backend_choices")
    module.register()
    assert "add_disagg_transfer_backend_choices" in capsys.readouterr().err
