"""Fixtures: the installed SGLang versions, tiny models, and reference tokens of colocated servers.

Environment (set by tests/e2e/run): PDXE2E_SGLANG, a comma list of VERSION=PYTHON; PDXE2E_SUITE, ci, full or quick.
By hand: PDXE2E_CYCLES, kills per test of test_faults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import client
import pytest
from models import write_model
from servers import Pair, Process, Sglang, free_ports, role

NEWEST, OLDEST = "0.5.23", "0.5.17"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only in the full suite")
    config.addinivalue_line("markers", "quick: also in the quick suite")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Deselected, not skipped: a skip is a failure here.
    suite = os.environ.get("PDXE2E_SUITE", "ci")
    keep, drop = [], []
    for item in items:
        full, quick = item.get_closest_marker("full"), item.get_closest_marker("quick")
        wanted = suite == "full" or (suite == "ci" and not full) or (suite == "quick" and quick)
        (keep if wanted else drop).append(item)
    items[:] = keep
    config.hook.pytest_deselected(items=drop)


@pytest.fixture(scope="session")
def logs() -> Path:
    folder = Path(os.environ["PDXE2E_LOGS"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def sglang(logs: Path) -> Callable[[str], Sglang]:
    pythons = dict(entry.split("=", 1) for entry in os.environ["PDXE2E_SGLANG"].split(","))
    known = {version: Sglang(version, python, logs) for version, python in pythons.items()}
    return lambda version: known[version]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(arch: str) -> Path:
        if arch not in made:
            made[arch] = write_model(tmp_path_factory.mktemp(arch), arch)
        return made[arch]

    return get


@pytest.fixture(scope="session")
def reference(sglang: Callable[[str], Sglang], model: Callable[[str], Path]) -> Callable[..., list[client.Tokens]]:
    """Tokens of a colocated server of the newest SGLang, computed once per model."""
    known: dict[str, list[client.Tokens]] = {}

    def get(arch: str, environment: dict[str, str] | None = None) -> list[client.Tokens]:
        if arch not in known:
            server = sglang(NEWEST).server(
                f"colocated-{arch}", model(arch), "--disable-overlap-schedule", environment=environment
            )
            try:
                known[arch] = client.through_url(server.start().wait_ready().url, client.prompts())
            finally:
                server.stop()
            half = len(known[arch]) // 2
            assert known[arch][:half] == known[arch][half:], "the colocated server is not deterministic"
        return known[arch]

    return get


class Starter:
    """Starts servers and remembers them."""

    def __init__(self, sglang: Callable[[str], Sglang], model: Callable[[str], Path]) -> None:
        self._sglang, self._model = sglang, model
        self._started: list[Process] = []

    def __call__(
        self,
        version: str,
        arch: str,
        *both: str,
        prefill: tuple[str, ...] = (),
        decode: tuple[str, ...] = (),
        prefill_env: dict[str, str] | None = None,
        decode_env: dict[str, str] | None = None,
        tp: tuple[int, int] = (1, 1),
        serve: bool = False,
        tokenizer: bool = False,
    ) -> Pair:
        """A pair that is ready. `both`, `prefill` and `decode` are further arguments."""
        (bootstrap,) = free_ports(1)
        first = self.half(
            version, "prefill", arch, bootstrap, *both, *prefill, environment=prefill_env, tp=tp[0], serve=serve,
            tokenizer=tokenizer,
        )  # fmt: skip
        second = self.half(
            version, "decode", arch, bootstrap, *both, *decode, environment=decode_env, tp=tp[1], tokenizer=tokenizer
        )
        return Pair(first.wait_ready(), second.wait_ready(), bootstrap)

    def half(self, version: str, mode: str, arch: str, bootstrap: int, *arguments: str, **options: Any) -> Process:
        """One server of a pair, started but not waited for."""
        installed = self._sglang(version)
        server = installed.server(
            f"{mode}-{arch}", self._model(arch), *role(installed, mode, bootstrap), *arguments, **options
        )
        self._started.append(server)
        return server.start()

    def stop(self) -> None:
        for process in self._started:
            process.terminate()
        for process in self._started:
            process.stop()


@pytest.fixture
def start_pair(sglang: Callable[[str], Sglang], model: Callable[[str], Path]) -> Iterator[Starter]:
    """Start a pair; everything that was started is stopped when the test ends."""
    starter = Starter(sglang, model)
    yield starter
    starter.stop()


@pytest.fixture(scope="module")
def start_for_module(sglang: Callable[[str], Sglang], model: Callable[[str], Path]) -> Iterator[Starter]:
    """The same for servers that the tests of a file share."""
    starter = Starter(sglang, model)
    yield starter
    starter.stop()
