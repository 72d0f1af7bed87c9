"""A device that captures its steps passes `graph`; one that captures too much, or keeps too little, does not."""

from __future__ import annotations

import pytest
from sglang_conformance.runner import Suite, Verdict

from tests.conformance.capturing import CapturingBackend, CapturingRuntime
from tests.conformance.graph_mutants import STEPS, runtime_of


def suite(runtime: type[CapturingRuntime]) -> Suite:
    backend = CapturingBackend()
    backend.runtime = runtime
    return Suite(backend, backend.probe()[0], num_threads=1, kernels=[])


def test_a_device_that_captures_its_steps_passes() -> None:
    results = list(suite(CapturingRuntime).run(["graph."]))
    assert [(r.title, r.reason) for r in results if r.verdict is not Verdict.PASS] == []
    assert {r.op for r in results} == {"graph.replay", "graph.state", "graph.memory", "graph.sampling"}


@pytest.mark.parametrize("name", STEPS)
def test_a_mistake_fails(name: str, kill_table: list[tuple[str, str, str]]) -> None:
    mine = suite(runtime_of(STEPS[name]))
    work = [(case, dtype) for case, dtype in mine.select(["graph."]) if dtype == case.dtypes[0]]
    killer = next((r for r in (mine.judge(*w) for w in work) if r.verdict is Verdict.FAIL), None)
    assert killer is not None, f"{name} lives"
    assert "Error:" not in killer.reason, f"{name} fails by raising: {killer.reason}"
    kill_table.append((name, killer.title, killer.reason))
