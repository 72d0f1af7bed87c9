"""Steps of a small model compiled by libtpu for a TPU that is not here, by the script that holds published shapes to budgets."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("jax")
pytest.importorskip("libtpu")

from sglang_tpu.aot_steps import CompiledStep
from sglang_tpu.chips import CHIPS

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "tpu" / "steps.py"
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tpu_steps", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tpu_steps"] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def decode(steps: ModuleType) -> tuple[list[CompiledStep], int]:
    case = steps.Case(config="llama-3.1-8b", changes=SMALL, chips=("v6e",), num_reqs=4, length=256)
    made: tuple[list[CompiledStep], int] = steps.compiled(case, "v6e", "decode of 4 x 256")
    return made


def test_a_decode_step_changes_pools_in_place_and_never_waits_for_the_host(
    decode: tuple[list[CompiledStep], int],
) -> None:
    forward, sample = decode[0]
    assert (forward.name, sample.name) == ("forward_step", "step")
    assert forward.num_state == forward.num_aliased == 2 * SMALL["num_hidden_layers"] + 1
    assert sample.num_aliased == sample.num_state
    assert forward.host_transfers == sample.host_transfers == ()


def test_a_decode_step_moves_little_more_than_weights_and_keys(decode: tuple[list[CompiledStep], int]) -> None:
    (forward, _), least = decode
    assert least < forward.traffic < 1.15 * least
    assert forward.arguments > least and forward.temporary < least


def test_what_is_over_a_budget_is_said(steps: ModuleType, decode: tuple[list[CompiledStep], int]) -> None:
    (forward, _), _ = decode
    budget = {what: getattr(forward, what) for what in steps.BUDGETED}
    room = CHIPS["v6e"].hbm_bytes
    assert list(steps.problems(forward, budget, room)) == []
    (over,) = steps.problems(forward, budget | {"traffic": forward.traffic - 1}, room)
    assert "bytes of traffic" in over
    assert ["has no budget" in line for line in steps.problems(forward, None, room)] == [True]
    assert ["holds" in line for line in steps.problems(forward, budget, forward.held - 1)] == [True]


def test_every_budget_is_of_a_case(steps: ModuleType) -> None:
    """One that nothing is held to any more would be looked up in vain. A case without one fails when it is compiled."""
    budgets = json.loads(steps.BUDGETS.read_text()).get(steps.SECTION, {})
    cases = {
        (chip, f"{case.name}, {title}, {step}")
        for case in steps.CASES
        for chip in case.chips
        for title in case.steps
        for step in ("forward_step", "step")
    }
    assert {(chip, key) for chip, keys in budgets.items() for key in keys} <= cases
