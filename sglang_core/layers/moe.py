"""The mixture-of-experts layer: router, experts, and the shared expert that every token visits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.layers.build import BuildContext, Layer, WeightSpec, dtype_name
from sglang_core.layers.linear import Linear
from sglang_core.layers.mlp import GatedMLP
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.moe_config import MoEConfig
from sglang_core.ops.gemm import dense
from sglang_core.ops.weight import PackedWeight
from sglang_core.parallel.groups import even_shard

EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")


class Router(Linear):
    """Hidden states to the weights and ids of the experts each token visits. Every rank computes all of it."""

    e_score_correction_bias: Tensor | None

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

    def load(self, parts: list[Tensor]) -> None:
        *linear, correction = parts if self.spec.has_bias else [*parts, None]
        super().load([p for p in linear if p is not None])
        self.register_buffer("e_score_correction_bias", correction, persistent=False)

    def route(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h: [T, M] -> weights: float32[T, K], ids: int32[T, K]."""
        logits = self.forward(h.to(self.dtype))
        weights, ids = self._route(logits, self.spec, self.e_score_correction_bias)
        return weights, ids


class Experts(Layer):
    """The experts' matrices as two stacks; each rank holds its share of every expert's width.

    The checkpoint keeps three matrices an expert, `{i}.{gate, up, down}` below this layer's name. Each goes into its place in
    the stacks as it is read.
    """

    w13: PackedWeight  # [X, 2F, M], gate then up
    w2: PackedWeight  # [X, M, F]

    def __init__(self, hidden_size: int, moe: MoEConfig, names: tuple[str, str, str] = EXPERT_NAMES) -> None:
        super().__init__()
        self.hidden_size, self.moe, self.names = hidden_size, moe, names
        self._stacks: tuple[Tensor, Tensor] | None = None  # while they are being filled

    def bind(self, ctx: BuildContext) -> None:
        self.dtype, moe = ctx.dtype, self.moe
        self.held = even_shard(moe.intermediate_size, ctx.tp.rank, ctx.tp.size, "intermediate_size of an expert")
        site = OpSite(
            op="moe.fused",
            layer="Experts",
            dtype=dtype_name(ctx.dtype),
            fmt="dense",
            spec=moe.experts,
            dims={"X": moe.route.num_experts, "K": moe.route.top_k, "M": self.hidden_size, "F": self.width},
        )
        bound = ctx.table.bind(site)
        self._fused, self._pack = bound.fn, bound.pack

    @property
    def width(self) -> int:
        """F on this rank."""
        return self.held[1] - self.held[0]

    def weights(self, prefix: str) -> list[WeightSpec]:
        size, hidden = self.moe.intermediate_size, self.hidden_size
        gate, up, down = self.names
        specs = []
        for i in range(self.moe.route.num_experts):
            for name in (gate, up):
                specs.append(self._spec(f"{prefix}.{i}.{name}.weight", (size, hidden), dim=0))
            specs.append(self._spec(f"{prefix}.{i}.{down}.weight", (hidden, size), dim=1))
        return specs

    def _spec(self, name: str, shape: tuple[int, int], *, dim: int) -> WeightSpec:
        return WeightSpec.of(name, shape, self.dtype, dim=dim, ranges=(self.held,), scale=shape[1] ** -0.5)

    def place(self, index: int, part: Tensor) -> Tensor:
        if self._stacks is None:
            num, f, m = self.moe.route.num_experts, self.width, self.hidden_size
            self._stacks = part.new_empty(num, 2 * f, m), part.new_empty(num, m, f)
        expert, which = divmod(index, 3)
        w13, w2 = self._stacks
        into = w2[expert] if which == 2 else w13[expert].narrow(0, which * self.width, self.width)
        return into.copy_(part)

    def load(self, parts: list[Tensor]) -> None:
        assert self._stacks is not None, "parts come through `place`"
        w13, w2 = (dense(stack) for stack in self._stacks)
        self._stacks = None
        self.w13, self.w2 = (w13, w2) if self._pack is None else (self._pack(w13), self._pack(w2))

    def forward(self, h: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """h: [T, M], weights: float32[T, K], ids: int32[T, K] -> [T, M], this rank's part of the sum over ranks."""
        y: Tensor = self._fused(h, self.w13, self.w2, weights, ids, self.moe.experts)
        return y


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
