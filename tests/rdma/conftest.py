"""Fixtures of the tests in the RDMA test bed. Outside it they fail: nothing here is skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bed import Link, require


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="100 faults and 10,000 transfers, not the short run of CI")


@pytest.fixture(scope="session", autouse=True)
def in_the_bed() -> None:
    require()


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture
def link() -> Iterator[Link]:
    wire = Link()
    yield wire
    wire.restore()
