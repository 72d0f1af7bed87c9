"""quant.quantize and quant.dequantize against their op bodies, bit for bit, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton.quantize_weight import dequantize, quantize
from torch import Tensor

from sglang_core.api.ops import OPS, Fmt

pytestmark = pytest.mark.usefixtures("tiles")
FORMATS = (
    *("fp8.tensor.static", "fp8.token_channel", "fp8.block128", "int8.token_channel", "int4.awq.g32", "int4.pack.g-1"),
    *("int4.gptq.g64.act_order", "mxfp4.g32", "nvfp4.g16"),
)


def weights(experts: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Zeros, large and tiny numbers, and one that is not small, in rows of their own; rows lie apart."""
    torch.manual_seed(0)
    w = torch.randn(experts, rows, columns + 8)
    w[:, 3], w[:, 5], w[:, 7] = 0.0, w[:, 5] * 8e3, w[:, 7] * 1e-4
    w[:, 1, 9:] *= 1e-3
    return w.to(dtype)[..., 8:]


@pytest.mark.parametrize("fmt", FORMATS)
def test_codes_and_scales_are_those_of_the_body(fmt: str) -> None:
    """A matrix, and a stack of two; rows no multiple of a block's, and columns where the format lets them be none of a group's."""
    rows, columns = 140 if fmt.endswith("block128") else 12, 64 if fmt.startswith(("mxfp4", "nvfp4")) else 148
    stack = weights(2, rows, columns, torch.float32 if fmt.startswith("int4") else torch.bfloat16)
    for w, x_scale in ((stack[0], torch.tensor([0.5])), (stack, torch.full((2, 1), 0.5))):
        given = x_scale if Fmt.parse(fmt).static else None
        want = OPS["quant.quantize"].body(w, fmt, x_scale=given)
        got = quantize(w, fmt, x_scale=given)
        assert (got.fmt, got.out_features, got.in_features) == (want.fmt, want.out_features, want.in_features)
        assert got.num_experts == want.num_experts
        expected = dict(want.named_buffers())
        assert set(dict(got.named_buffers())) == set(expected)
        for name, tensor in got.named_buffers():
            assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
            assert torch.equal(tensor.contiguous().view(torch.uint8), expected[name].contiguous().view(torch.uint8)), (
                name
            )
        for out in (torch.float32, torch.bfloat16):
            assert torch.equal(dequantize(want, out), OPS["quant.dequantize"].body(want, out))


def test_dense_weights_stay() -> None:
    w = weights(1, 16, 32, torch.bfloat16)[0]
    packed = quantize(w, "dense")
    assert torch.equal(packed["weight"], w)
    assert torch.equal(dequantize(packed), w.float())
