"""An op that writes to what it is given is found out, wherever in its arguments that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sglang_conformance.guard import guarded, same_bits

from sglang_core.ops.gemm import dense
from sglang_core.ops.lora import ExpertAdapters


def adapters() -> ExpertAdapters:
    return ExpertAdapters(**{name: torch.ones(2) for name in ("a13", "b13", "a2", "b2", "scale")})


@pytest.mark.parametrize(
    ("given", "write", "named"),
    [
        (torch.ones(2), lambda x: x.add_(1), "argument 1"),
        (torch.ones(2, dtype=torch.int32), lambda x: x.add_(1), "argument 1"),
        (torch.ones(2).to(torch.float8_e4m3fn), lambda x: x.copy_(torch.zeros(2)), "argument 1"),
        (dense(torch.ones(2, 2)), lambda w: w["weight"].zero_(), r"argument 1\.weight"),
        (adapters(), lambda a: a.b2.zero_(), r"argument 1\.b2"),
        ([torch.ones(1), torch.ones(1)], lambda xs: xs[1].zero_(), r"argument 1\[1\]"),
    ],
    ids=["floats", "ints", "fp8", "weight", "dataclass", "list"],
)
def test_a_changed_input_is_named(given: Any, write: Callable[[Any], Any], named: str) -> None:
    with pytest.raises(AssertionError, match=f"acme.op changes its input: {named}$"):
        guarded("acme.op", write)(given)


def test_keyword_arguments_are_watched_and_a_plans_out_is_not() -> None:
    with pytest.raises(AssertionError, match="changes its input: bias"):
        guarded("acme.op", lambda *, bias: bias.add_(1))(bias=torch.ones(2))
    assert guarded("acme.plan", lambda *, out: out.add_(1))(out=torch.ones(2)).tolist() == [2.0, 2.0]


def test_results_come_through_and_reading_is_no_change() -> None:
    x = torch.tensor([float("nan"), 1.0])
    assert same_bits(guarded("acme.op", lambda x: x + 1)(x), x + 1)


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2).bfloat16(), torch.tensor([0.0, 1.0])])
def test_bits_differ_by_shape_dtype_and_value(other: torch.Tensor) -> None:
    assert not same_bits(torch.zeros(2), other)
    assert same_bits(torch.empty(0, 3), torch.empty(0, 3))
