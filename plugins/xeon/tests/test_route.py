from __future__ import annotations

import pytest
import torch
from sglang_xeon import moe

from sglang_core.api.ops import OPS, RouteSpec

BODY = OPS["moe.route"].body
SPECS = {
    "qwen3": RouteSpec(num_experts=128, top_k=8, renormalize=True),
    "odd": RouteSpec(num_experts=61, top_k=4),
    "gpt-oss": RouteSpec(num_experts=32, top_k=4, scoring="softmax_after_top_k"),
    "deepseek-v2": RouteSpec(num_experts=64, top_k=6, num_groups=8, top_groups=3, scale=16.0),
    "deepseek-v3": RouteSpec(
        num_experts=256,
        top_k=8,
        scoring="sigmoid",
        num_groups=8,
        top_groups=4,
        group_score="top2_sum",
        has_bias=True,
        renormalize=True,
        scale=2.5,
    ),
    "llama-4": RouteSpec(num_experts=16, top_k=1, scoring="sigmoid"),
    "all": RouteSpec(num_experts=5, top_k=5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tokens", [0, 1, 200])
def test_route_is_the_body(level: str, dtype: torch.dtype, name: str, tokens: int) -> None:
    spec = SPECS[name]
    logits = (torch.randn(tokens, spec.num_experts) * 2).to(dtype)  # bfloat16 has many equals: the lowest id wins
    bias = torch.randn(spec.num_experts) * 0.5 - 3 if spec.has_bias else None
    weights, ids = moe.route(logits, spec, bias)
    want_weights, want_ids = BODY(logits, spec, bias)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=1e-7)


def test_equals_rank_by_id(level: str) -> None:
    spec = RouteSpec(num_experts=12, top_k=3, num_groups=3, top_groups=2)
    logits = torch.tensor([[1.0] * 12, [0.0, 2, 2, 1] * 3, [0.0] * 8 + [1.0] * 4])
    assert torch.equal(moe.route(logits, spec)[1], BODY(logits, spec)[1])


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_a_row_of_nan_names_experts_that_exist(level: str, name: str) -> None:
    spec = SPECS[name]
    ids = moe.route(torch.full((2, spec.num_experts), float("nan")), spec)[1]
    assert bool(((ids >= 0) & (ids < spec.num_experts)).all())


def test_wrong_sizes_are_refused(level: str) -> None:
    with pytest.raises(RuntimeError, match="the router's bias must be float32"):
        moe.route(torch.randn(2, 256), SPECS["deepseek-v3"], torch.zeros(255))
