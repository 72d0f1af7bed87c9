"""Linear layers in every format."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_core.ops.weight import PackedWeight
from tests.conformance.mutants.bodies import Mutant, body


def accumulates_in_bf16(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    weight = w["weight"]
    y = torch.zeros(*x.shape[:-1], weight.shape[0], dtype=torch.bfloat16)
    for k in range(0, x.shape[-1], 64):
        y += (x[..., k : k + 64].float() @ weight[:, k : k + 64].float().T).bfloat16()
    return (y if bias is None else y + bias).to(x.dtype)


def forgets_bias(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, w["weight"])


def zero_points_in_four_bits(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """GPTQ's go to 16."""
    if "zero" in dict(w.named_buffers()):
        made = dict(w.named_buffers()) | {"zero": w["zero"] & 15}
        w = PackedWeight(w.fmt, made, out_features=w.out_features, in_features=w.in_features)
    return body("gemm.linear", x, w, bias)  # type: ignore[no-any-return]


def does_not_saturate(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """Activations past the largest code of a scale that was given become NaN."""
    y = body("gemm.linear", x, w, bias)
    if "x_scale" not in dict(w.named_buffers()) or not w.fmt.startswith("fp8"):
        return y  # type: ignore[no-any-return]
    past = (x.float() / w["x_scale"]).abs().amax(-1, keepdim=True) > 464.0
    return torch.where(past, torch.nan, y)


def adds_a_zero_times_a_row(x: Tensor, w: PackedWeight, group_sizes: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows of no group are multiplied by zero, whatever they hold."""
    y = body("gemm.grouped", x, w, group_sizes, bias)
    return y + x.sum(-1, keepdim=True) * 0.0  # type: ignore[no-any-return]


MUTANTS = {
    "accumulates_in_bf16": Mutant("gemm.linear"),
    "forgets_bias": Mutant("gemm.linear"),
    "zero_points_in_four_bits": Mutant("gemm.linear", "any codes"),
    "does_not_saturate": Mutant("gemm.linear", "any codes"),
    "adds_a_zero_times_a_row": Mutant("gemm.grouped", "rows of no group"),
}
