"""Every component of the cache: our sending methods against those of the installed SGLang. See components.py."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NEWEST, OLDEST
from servers import Sglang


@pytest.mark.quick
@pytest.mark.parametrize("version", [NEWEST, OLDEST])
def test_every_component_lands_as_sglang_would_put_it(version: str, sglang: Callable[[str], Sglang]) -> None:
    script = Path(__file__).with_name("components.py")
    result = subprocess.run([sglang(version).python, str(script)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "all components agree" in result.stdout, result.stdout + result.stderr[-4000:]
