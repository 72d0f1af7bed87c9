"""The gated MLP."""

from __future__ import annotations

from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.layers.build import BuildContext, Layer, dtype_name
from sglang_core.layers.linear import GateUpLinear, RowLinear
from sglang_core.layers.model_config import ModelConfig


class GatedMLP(Layer):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.activation = cfg.activation
        self.gate_up_proj = GateUpLinear(
            cfg.hidden_size, cfg.intermediate_size, bias=cfg.mlp_bias, fused=cfg.fused_projections
        )
        self.down_proj = RowLinear(cfg.intermediate_size, cfg.hidden_size, bias=cfg.mlp_bias)

    def bind(self, ctx: BuildContext) -> None:
        width = self.down_proj.in_features // ctx.tp.size
        site = OpSite(
            op="act.gated", layer="GatedMLP", dtype=dtype_name(ctx.dtype), spec=self.activation, dims={"F": width}
        )
        self._act = ctx.table.bind(site).fn

    def forward(self, h: Tensor) -> Tensor:
        """h: [T, M] -> [T, M]."""
        return self.down_proj(self._act(self.gate_up_proj(h), self.activation))  # type: ignore[no-any-return]
