"""Experts in int8 and int4 against the op's definition: the suite has no case of them in a half type."""

from __future__ import annotations

import pytest
import torch
from sglang_npu import int4, moe

from sglang_core.api.ops import OPS, ExpertSpec

TOKENS, EXPERTS, MODEL, WIDTH, TOP = 17, 6, 64, 96, 3


# A scale of int8 has 8 bits where activations are bfloat16, and a code that lies on an edge turns. What a code of 4 bits stands for is rounded.
ERRORS = {"int8": {torch.bfloat16: 1.5e-2, torch.float16: 6e-3}, "int4": {torch.bfloat16: 8e-3, torch.float16: 2e-3}}
FORMATS = ("int8.token_channel", "int4.awq.g32", "int4.gptq.g128", "int4.pack.g32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_experts_of_codes(fmt: str, dtype: torch.dtype, mapped: bool, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * scale

    quantize = OPS["quant.quantize"].body
    w13 = quantize(randn(EXPERTS, 2 * WIDTH, MODEL, scale=MODEL**-0.5), fmt)
    w2 = quantize(randn(EXPERTS, MODEL, WIDTH, scale=WIDTH**-0.5), fmt)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(TOKENS)]).int()
    weights = randn(TOKENS, TOP).softmax(-1)
    biases = {"bias13": randn(EXPERTS, 2 * WIDTH).to(dtype), "bias2": randn(EXPERTS, MODEL).to(dtype)} if biased else {}
    chosen = {"expert_map": torch.tensor([3, -1, 0, 5, -1, 1], dtype=torch.int32)} if mapped else {}
    given = weights, ids, ExpertSpec()
    x = randn(TOKENS, MODEL).to(dtype)
    packed = [(int4 if fmt.startswith("int4") else moe).pack(w) for w in (w13, w2)]
    ours = moe.fused(x, *packed, *given, **biases, **chosen)
    body = OPS["moe.fused"].body(x, w13, w2, *given, **biases, **chosen)
    error = (ours.float() - body.float()).square().mean().sqrt() / body.float().square().mean().sqrt()
    assert error < ERRORS[fmt[:4]][dtype], float(error)


def test_a_stack_of_four_bits_is_packed_and_taken_out_again() -> None:
    w = OPS["quant.quantize"].body(torch.randn(3, 44, 64, generator=torch.Generator().manual_seed(0)), "int4.awq.g32")
    packed = int4.pack(w)
    again = int4.pack(w, int4.pack(OPS["quant.quantize"].body(torch.zeros(3, 44, 64), "int4.awq.g32")))
    assert packed["weight"].shape == (3, 64, 6) and packed.num_experts == 3
    for name in ("weight", "scale", "zero"):
        assert torch.equal(int4.unpack(packed)[name], w[name]) and torch.equal(int4.unpack(again)[name], w[name])
