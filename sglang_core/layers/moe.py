"""The mixture-of-experts layer: router, experts, and the shared expert that every token visits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.layers.build import BuildContext, Layer, WeightSpec, dtype_name
from sglang_core.layers.experts import EXPERT_NAMES, Experts
from sglang_core.layers.linear import Linear
from sglang_core.layers.mlp import GatedMLP
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.moe_config import MoEConfig


class Router(Linear):
    """Hidden states to the weights and ids of the experts each token visits. Every rank computes all of it."""

    e_score_correction_bias: Tensor | None
    always_dense = True

    def __init__(self, hidden_size: int, moe: MoEConfig, *, bias: bool = False) -> None:
        super().__init__(hidden_size, moe.route.num_experts, bias=bias)
        self.spec, self.float32 = moe.route, moe.router_float32

    def bind(self, ctx: BuildContext) -> None:
        if self.float32:
            ctx = replace(ctx, dtype=torch.float32)
        super().bind(ctx)
        dims = {"X": self.spec.num_experts, "K": self.spec.top_k}
        site = OpSite(op="moe.route", layer="Router", dtype=dtype_name(ctx.dtype), spec=self.spec, dims=dims)
        self._route = ctx.table.bind(site).fn

    def weights(self, prefix: str) -> list[WeightSpec]:
        specs = super().weights(prefix)
        if self.spec.has_bias:
            name, shape = f"{prefix}.e_score_correction_bias", (self.spec.num_experts,)
            specs.append(WeightSpec(name=name, shape=shape, dtype=torch.float32, scale=0.1))
        return specs

    def place(self, index: int, part: Tensor) -> Tensor:
        return part.clone() if index == len(self._arriving) else super().place(index, part)

    def load(self, parts: list[Tensor]) -> None:
        *linear, correction = parts if self.spec.has_bias else [*parts, None]
        super().load([p for p in linear if p is not None])
        self.register_buffer("e_score_correction_bias", correction, persistent=False)

    def route(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h: [T, M] -> weights: float32[T, K], ids: int32[T, K]."""
        logits = self.forward(h.to(self.dtype))
        weights, ids = self._route(logits, self.spec, self.e_score_correction_bias)
        return weights, ids


class MoE(Layer):
    """Routed experts, plus the shared expert where there is one; `shared` is its name in the checkpoint."""

    def __init__(
        self, cfg: ModelConfig, *, names: tuple[str, str, str] = EXPERT_NAMES, shared: str = "shared_expert"
    ) -> None:
        super().__init__()
        assert cfg.moe is not None, "a model of experts has cfg.moe"
        self.moe, self.shared = cfg.moe, shared
        self.gate = Router(cfg.hidden_size, cfg.moe)
        self.experts = Experts(cfg.hidden_size, cfg.moe, names)
        if cfg.moe.shared_size:
            mlp = GatedMLP(cfg, intermediate_size=cfg.moe.shared_size, reduce=False)
            self.add_module(shared, mlp)
        if cfg.moe.shared_gate:
            self.shared_expert_gate = Linear(cfg.hidden_size, 1)
            self.shared_expert_gate.always_dense = True

    def bind(self, ctx: BuildContext) -> None:
        self._tp = ctx.tp

    def forward(self, h: Tensor) -> Tensor:
        """h: [T, M] -> [T, M]. Routed and shared experts meet before the one sum over ranks."""
        weights, ids = self.gate.route(h)
        y = self.experts(h, weights, ids)
        if self.moe.shared_size:
            shared = self.get_submodule(self.shared)(h)
            if self.moe.shared_gate:
                shared = shared * torch.sigmoid(self.shared_expert_gate(h).float()).to(shared.dtype)
            y = y + shared
        return self._tp.all_reduce(y)
