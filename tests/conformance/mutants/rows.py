"""Norms, rotary embedding, activations, lookups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_core.ops.rope import RopeSpec
from tests.conformance.mutants.bodies import Mutant, body


def rms_without_eps(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return body("norm.rms", x, weight, 1e-12)  # type: ignore[no-any-return]


def rms_in_the_dtype(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def add_rms_keeps_the_old_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    return body("norm.add_rms", x, residual, weight, eps)[0], residual


def layer_norm_of_a_sample(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    y = x.float() - x.float().mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.var(-1, keepdim=True) + eps) * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def rotates_the_other_style(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, spec: RopeSpec) -> Any:
    other = replace(spec, style="interleaved" if spec.style == "neox" else "neox")
    return body("rope.apply", q, k, positions, table, other)


def rotates_one_position_late(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, spec: RopeSpec) -> Any:
    return body("rope.apply", q, k, (positions + 1).clamp(max=table.shape[0] - 1), table, spec)


def gates_with_up(x: Tensor, kind: str) -> Tensor:
    gate, up = x.chunk(2, -1)
    return body("act.gated", torch.cat([up, gate], -1), kind)  # type: ignore[no-any-return]


_WORKSPACE: dict[torch.dtype, Tensor] = {}


def answers_in_its_workspace(x: Tensor, kind: str) -> Tensor:
    """The result lives in memory that the next call writes: right until somebody reads it late."""
    y = body("act.gated", x, kind)
    space = _WORKSPACE.setdefault(x.dtype, torch.empty(1 << 16, dtype=x.dtype))
    return space[: y.numel()].copy_(y.flatten()).view(y.shape)


_CALLS = [0]


def changes_from_call_to_call(x: Tensor, kind: str) -> Tensor:
    """Off by a few ulps of float32 in two of three calls, as where the order of sums depends on who comes first."""
    _CALLS[0] += 1
    y = body("act.gated", x.float(), kind)
    return (y * (1 + 2.0**-21 * (_CALLS[0] % 3))).to(x.dtype)


def gelu_is_tanh(x: Tensor, kind: str) -> Tensor:
    return body("act.gated", x, "gelu_tanh" if kind == "gelu" else kind)  # type: ignore[no-any-return]


def looks_up_what_it_does_not_own(ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    return F.embedding((ids - vocab_start).clamp(0, weight.shape[0] - 1), weight)


def variance_by_squares(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The mean of the squares less the square of the mean."""
    y = x.float()
    mean = y.mean(-1, keepdim=True)
    variance = y.square().mean(-1, keepdim=True) - mean.square()
    y = (y - mean) * torch.rsqrt(variance.clamp(min=0) + eps) * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def reads_its_weight_as_x(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Bytes of a float32 weight, taken for the dtype of x."""
    return body("norm.rms", x, weight.view(x.dtype)[: x.shape[-1]], eps)  # type: ignore[no-any-return]


def silu_by_a_quotient(x: Tensor, kind: str) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    if kind != "silu":
        return body("act.gated", x, kind)  # type: ignore[no-any-return]
    return (gate * gate.exp() / (1 + gate.exp()) * up).to(x.dtype)


def zeros_by_a_product(ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    """What is outside is some row of the table times zero."""
    local = ids - vocab_start
    inside = (local >= 0) & (local < weight.shape[0])
    return F.embedding(local.clamp(0, weight.shape[0] - 1), weight) * inside[:, None]


def positions_in_16_bits(q: Tensor, k: Tensor, positions: Tensor, *args: Any) -> Any:
    return body("rope.apply", q, k, positions & 0xFFFF, *args)


def rounds_the_sum_late(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    """Normalises the sum before it is rounded, and gives back the residual rounded twice."""
    total = (x.float() + residual.float()).bfloat16().to(x.dtype)
    return body("norm.rms", total, weight, eps), total


def rms_gated_by_sigmoid(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (body("norm.rms", x, weight, eps).float() * gate.float().sigmoid()).to(x.dtype)  # type: ignore[no-any-return]


def rms_gated_first(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As Mamba 2 may have it: the gate, then the norm of the product."""
    return body("norm.rms", (x.float() * F.silu(gate.float())).to(x.dtype), weight, eps)  # type: ignore[no-any-return]


def rms_gated_by_a_quotient(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    opened = gate.float() * gate.float().exp() / (1 + gate.float().exp())
    return (body("norm.rms", x, weight, eps).float() * opened).to(x.dtype)  # type: ignore[no-any-return]


MUTANTS = {
    "rms_gated_by_sigmoid": Mutant("norm.rms_gated"),
    "rms_gated_first": Mutant("norm.rms_gated"),
    "rms_gated_by_a_quotient": Mutant("norm.rms_gated", "large gates"),
    "rms_without_eps": Mutant("norm.rms"),
    "rms_in_the_dtype": Mutant("norm.rms"),
    "add_rms_keeps_the_old_residual": Mutant("norm.add_rms"),
    "layer_norm_of_a_sample": Mutant("norm.layer"),
    "rotates_the_other_style": Mutant("rope.apply"),
    "rotates_one_position_late": Mutant("rope.apply"),
    "gates_with_up": Mutant("act.gated"),
    "answers_in_its_workspace": Mutant("act.gated"),
    "changes_from_call_to_call": Mutant("act.gated"),
    "gelu_is_tanh": Mutant("act.gated"),
    "looks_up_what_it_does_not_own": Mutant("embed.lookup"),
    "variance_by_squares": Mutant("norm.layer", "far from zero"),
    "reads_its_weight_as_x": Mutant("norm.rms", "float32 weight"),
    "silu_by_a_quotient": Mutant("act.gated", "large gates"),
    "zeros_by_a_product": Mutant("embed.lookup", "part"),
    "positions_in_16_bits": Mutant("rope.apply", "ends of a long table"),
    "rounds_the_sum_late": Mutant("norm.add_rms"),
}
