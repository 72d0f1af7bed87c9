"""`@op` with parts: a composite is written once, over ops that selection may fill in."""

from __future__ import annotations

import pytest

from sglang_core.ops import registry


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "OPS", {})


def define_double() -> None:
    @registry.op("t.double")
    def double(x):
        return 2 * x

    @registry.op("t.double_plus", composite={"double": "t.double"})
    def double_plus(x, y, *, double=double):
        return double(x) + y


def test_a_composite_runs_its_own_parts_by_default_and_bound_ones_when_decomposed() -> None:
    define_double()
    op = registry.OPS["t.double_plus"]
    assert op.composite
    assert op.body(3, 1) == 7
    assert op.decompose({"t.double": lambda x: 100 * x}.__getitem__)(3, 1) == 301


def test_parts_must_be_parameters_that_default_to_the_ops_bodies() -> None:
    define_double()
    for body in (lambda x, *, twice=None: x, lambda x, *, double=None: x, lambda x, double=None: x):
        with pytest.raises(AssertionError, match="keyword-only parameter 'double'"):
            registry.op("t.bad", composite={"double": "t.double"})(body)
    with pytest.raises(AssertionError, match="not defined before it"):
        registry.op("t.bad", composite={"double": "t.none"})(lambda x: x)


def test_two_definitions_of_one_op_are_a_bug() -> None:
    define_double()
    with pytest.raises(AssertionError, match="defined twice"):
        registry.op("t.double")(lambda x: x)


@pytest.mark.parametrize(("name", "strict"), [("attn.paged", True), ("gemm.linear", True), ("norm.rms", False)])
def test_families_say_how_bad_a_fallback_is(name: str, strict: bool) -> None:
    assert registry.OpDef(name=name, body=len).strict is strict
