"""`pytest --pyargs sglang_conformance --device NAME`: every case as a test. Loaded by every pytest; silent in all others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sglang_conformance.runner import Suite


def pytest_addoption(parser: pytest.Parser) -> None:
    if not any("sglang_conformance" in arg for arg in sys.argv[1:]):
        return  # `--device` is a name that other suites want too
    group = parser.getgroup("sglang conformance")
    group.addoption("--device", default="cpu", help="backend name, or name:index (default cpu)")
    group.addoption("--conformance-seed", type=int, default=0, help="seed of every case's numbers")


@pytest.fixture(scope="session", name="conformance_suite")
def _suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    from sglang_conformance.runner import Suite  # torch: not for every pytest of this environment
    from sglang_core.backend.devices import open_device

    chosen = open_device(request.config.getoption("--device"))
    suite = Suite(chosen.backend, chosen.info, seed=request.config.getoption("--conformance-seed"))
    yield suite
    suite.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__ == "sglang_conformance.test_device" and "case" in metafunc.fixturenames:
        from sglang_conformance.case import all_cases

        pairs = [(case, dtype) for case in all_cases() for dtype in case.dtypes]
        metafunc.parametrize(("case", "dtype"), pairs, ids=[case.title(dtype) for case, dtype in pairs])
