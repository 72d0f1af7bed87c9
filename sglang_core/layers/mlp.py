"""The gated MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.layers.build import BuildContext, Layer, dtype_name
from sglang_core.layers.linear import GateUpLinear, RowLinear, codes_for, stored_format
from sglang_core.layers.model_config import ModelConfig
from sglang_core.ops.codes import Codes
from sglang_core.parallel.groups import aligned_shard


class GatedMLP(Layer):
    """down(act(gate(x)) * up(x))."""

    codes = ""  # the kind of those that the middle hands on in place of a tensor; known once settled
    _whole: Callable[..., Tensor] | None = None  # gemm.linear_gated: both projections and the activation

    def __init__(self, cfg: ModelConfig, *, intermediate_size: int | None = None, reduce: bool = True) -> None:
        """Of the model's own width by default; without `reduce`, the result is this rank's part of the sum over ranks."""
        super().__init__()
        self.activation = cfg.activation
        size = cfg.intermediate_size if intermediate_size is None else intermediate_size
        self.gate_up_proj = GateUpLinear(cfg.hidden_size, size, bias=cfg.mlp_bias, fused=cfg.fused_projections)
        self.down_proj = RowLinear(size, cfg.hidden_size, bias=cfg.mlp_bias, reduce=reduce)

    def bind(self, ctx: BuildContext) -> None:
        up, down = self.gate_up_proj, self.down_proj
        names = ["gate_up_proj"] if up.fused else ["gate_proj", "up_proj"]
        steps = [stored_format(self.quant, f"{self.name}.{name}").row_step(up.in_features) for name in names]
        columns = stored_format(self.quant, f"{self.name}.down_proj").column_step(down.in_features)
        up.unit = down.unit = math.lcm(*steps, columns)
        first, last = aligned_shard(down.in_features, ctx.tp.rank, ctx.tp.size, down.unit, "intermediate_size")
        width = last - first
        site = OpSite(
            op="act.gated", layer="GatedMLP", dtype=dtype_name(ctx.dtype), spec=self.activation, dims={"F": width}
        )
        self._act, self._site = ctx.table.bind(site).fn, site

    def settle(self, ctx: BuildContext) -> None:
        site = replace(self._site, op="act.gated_quant", fmt=codes_for([self.down_proj]))
        if site.fmt and ctx.table.has_kernel(site):
            self.codes, self._act_quant = site.fmt, ctx.table.bind(site).fn
        elif not self.gate_up_proj.takes:
            self._whole = self.gate_up_proj.composite(ctx, "gemm.linear_gated", self.activation, self._site)

    def forward(self, h: Tensor | Codes) -> Tensor:
        """h: [T, M], or codes of it -> [T, M]."""
        if self._whole is not None:
            up = self.gate_up_proj
            return self.down_proj(self._whole(h, up.weight, self.activation, up.bias))  # type: ignore[no-any-return]
        x = self.gate_up_proj(h)
        if self.codes:
            return self.down_proj(self._act_quant(x, self.activation, self.codes))  # type: ignore[no-any-return]
        return self.down_proj(self._act(x, self.activation))  # type: ignore[no-any-return]
