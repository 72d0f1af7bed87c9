"""Normalisation layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.layers.build import BuildContext, Layer, WeightSpec, dtype_name
from sglang_core.layers.linear import Linear, codes_for


class RMSNorm(Layer):
    """Root-mean-square norm over the last dim. With `offset`, the checkpoint holds `w` where `1 + w` multiplies (Gemma)."""

    weight: Tensor
    codes = ""  # the kind of those that `forward` gives in place of a tensor; known once settled

    def __init__(self, size: int, eps: float, *, offset: bool = False) -> None:
        super().__init__()
        self.size, self.eps, self.offset = size, eps, offset
        self._fed: tuple[Linear, ...] = ()

    def feeds(self, *linears: Linear) -> None:
        """Say that what `forward` gives goes to these layers alone: it may then be codes, which all of them take."""
        self._fed = linears

    def settle(self, ctx: BuildContext) -> None:
        site = replace(self.site("norm.add_rms_quant", ctx), fmt=codes_for(self._fed))
        if site.fmt and ctx.table.has_kernel(site):
            self.codes, self._add_rms_quant = site.fmt, ctx.table.bind(site).fn

    def bind(self, ctx: BuildContext) -> None:
        self.dtype = torch.float32 if self.offset else ctx.dtype  # 1 + w would lose the low bits of w
        self._rms, self._add_rms = (ctx.table.bind(self.site(op, ctx)).fn for op in ("norm.rms", "norm.add_rms"))

    def site(self, op: str, ctx: BuildContext) -> OpSite:
        return OpSite(op=op, layer="RMSNorm", dtype=dtype_name(ctx.dtype), dims={"M": self.size})

    def weights(self, prefix: str) -> list[WeightSpec]:
        return [
            WeightSpec(
                name=f"{prefix}.weight", shape=(self.size,), dtype=self.dtype, init="zeros" if self.offset else "ones"
            )
        ]

    def load(self, parts: list[Tensor]) -> None:
        weight = parts[0] + 1 if self.offset else parts[0]
        self.register_buffer("weight", weight, persistent=False)

    def normalize(self, x: Tensor) -> Tensor:
        """x: [..., M] -> [..., M]."""
        y: Tensor = self._rms(x, self.weight, self.eps)
        return y

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Any, Tensor]:
        """x, residual: [T, M] -> the norm of their sum, perhaps as codes for those it feeds, and the sum. No residual yet: it is x."""
        if residual is None:
            return self._rms(x, self.weight, self.eps), x
        if self.codes:
            codes, total = self._add_rms_quant(x, residual, self.weight, self.eps, self.codes)
            return codes, total
        y, total = self._add_rms(x, residual, self.weight, self.eps)
        return y, total


class GatedRMSNorm(Layer):
    """Root-mean-square norm over the last dim, times silu of a gate."""

    weight: Tensor

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.size, self.eps = size, eps

    def bind(self, ctx: BuildContext) -> None:
        self.dtype = ctx.dtype
        dims = {"M": self.size}
        site = OpSite(op="norm.rms_gated", layer="GatedRMSNorm", dtype=dtype_name(ctx.dtype), dims=dims)
        self._norm = ctx.table.bind(site).fn

    def weights(self, prefix: str) -> list[WeightSpec]:
        return [WeightSpec(name=f"{prefix}.weight", shape=(self.size,), dtype=self.dtype, init="ones")]

    def load(self, parts: list[Tensor]) -> None:
        self.register_buffer("weight", parts[0], persistent=False)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate: [..., M] -> [..., M]."""
        y: Tensor = self._norm(x, gate, self.weight, self.eps)
        return y


class LayerNorm(Layer):
    """Mean and variance norm over the last dim."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, size: int, eps: float, *, bias: bool = True) -> None:
        super().__init__()
        self.size, self.eps, self.has_bias = size, eps, bias

    def bind(self, ctx: BuildContext) -> None:
        self.dtype = ctx.dtype
        site = OpSite(op="norm.layer", layer="LayerNorm", dtype=dtype_name(ctx.dtype), dims={"M": self.size})
        self._norm = ctx.table.bind(site).fn

    def weights(self, prefix: str) -> list[WeightSpec]:
        specs = [WeightSpec(name=f"{prefix}.weight", shape=(self.size,), dtype=self.dtype, init="ones")]
        if self.has_bias:
            specs.append(WeightSpec(name=f"{prefix}.bias", shape=(self.size,), dtype=self.dtype, init="zeros"))
        return specs

    def load(self, parts: list[Tensor]) -> None:
        self.register_buffer("weight", parts[0], persistent=False)
        self.register_buffer("bias", parts[1] if self.has_bias else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., M] -> [..., M]."""
        y: Tensor = self._norm(x, self.weight, self.bias, self.eps)
        return y
