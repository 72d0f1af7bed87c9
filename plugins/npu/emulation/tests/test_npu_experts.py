"""Experts in int8 against the op's definition: the suite has no case of them in a half type."""

from __future__ import annotations

import pytest
import torch
from sglang_npu import moe

from sglang_core.api.ops import OPS, ExpertSpec

TOKENS, EXPERTS, MODEL, WIDTH, TOP = 17, 6, 64, 96, 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_int8_experts(dtype: torch.dtype, mapped: bool, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    quantize = OPS["quant.quantize"].body
    w13 = quantize(randn(EXPERTS, 2 * WIDTH, MODEL, scale=MODEL**-0.5), "int8.token_channel")
    w2 = quantize(randn(EXPERTS, MODEL, WIDTH, scale=WIDTH**-0.5), "int8.token_channel")
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(TOKENS)]).int()
    weights = randn(TOKENS, TOP).softmax(-1)
    biases = {"bias13": randn(EXPERTS, 2 * WIDTH).to(dtype), "bias2": randn(EXPERTS, MODEL).to(dtype)} if biased else {}
    chosen = {"expert_map": torch.tensor([3, -1, 0, 5, -1, 1], dtype=torch.int32)} if mapped else {}
    given = randn(TOKENS, MODEL).to(dtype), w13, w2, weights, ids, ExpertSpec()
    ours, body = (fn(*given, **biases, **chosen) for fn in (moe.fused, OPS["moe.fused"].body))
    # A scale of the weight has 8 bits where activations are bfloat16, and a code that lies on an edge turns.
    error = (ours.float() - body.float()).square().mean().sqrt() / body.float().square().mean().sqrt()
    assert error < (1.5e-2 if dtype == torch.bfloat16 else 6e-3), float(error)
