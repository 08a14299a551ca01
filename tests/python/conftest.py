"""Fixtures of more than one test file."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from bench_library import Library, served_channel

from pdxfer.bench import movers
from pdxfer.bench.channel import Channel


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """A transfer library that the bench knows as "test"."""
    module = Library()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(movers.MOVERS, "test", (module.__name__, "cannot be installed"))
    return module


@pytest.fixture
def channel() -> Iterator[Channel]:
    """To a receiving end of the bench in a thread."""
    with served_channel() as out:
        yield out
