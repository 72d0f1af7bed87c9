"""The gated delta net layer: a token mixer of linear cost whose memory is a state of fixed size, not a cache that grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.backend.state_pool import StatePoolSpec
from sglang_core.errors import ConfigError
from sglang_core.layers.build import BuildContext, Layer, PoolLayer, WeightSpec, dtype_name
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.linear import ColumnLinear, Linear, RowLinear, stored_format
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.norm import GatedRMSNorm
from sglang_core.ops.codes import Codes
from sglang_core.ops.ssm_plan import GatedDeltaSpec, StatePlan
from sglang_core.parallel.groups import even_shard
from sglang_core.types import STATE

Ranges = tuple[tuple[int, int], ...]
DEFAULT_SIZES = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedDeltaConfig:
    """Sizes of the whole model's layer, not of a rank's."""

    num_k_heads: int
    num_v_heads: int
    k_head_dim: int
    v_head_dim: int
    conv_width: int

    @property
    def by_key_head(self) -> tuple[int, int, int, int]:
        """Rows of q, k, v, z that the projection has of a key head, one below the other."""
        value = self.num_v_heads // self.num_k_heads * self.v_head_dim
        return self.k_head_dim, self.k_head_dim, value, value

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> GatedDeltaConfig:
        """Read config.json, whose defaults are Qwen3-Next's. Raises ConfigError on sizes that cannot be."""
        sizes = {key: hf.get(key, default) for key, default in DEFAULT_SIZES.items()}
        for key, size in sizes.items():
            least = 2 if key == "linear_conv_kernel_dim" else 1
            if not isinstance(size, int) or size < least:
                raise ConfigError(f"config.json: {key}={size!r} must be an integer of at least {least}")
        k_heads, v_heads, k_head_dim, v_head_dim, conv_width = sizes.values()
        if v_heads % k_heads:
            raise ConfigError(
                f"config.json: linear_num_value_heads={v_heads} must be a multiple of linear_num_key_heads={k_heads}"
            )
        return cls(
            num_k_heads=k_heads,
            num_v_heads=v_heads,
            k_head_dim=k_head_dim,
            v_head_dim=v_head_dim,
            conv_width=conv_width,
        )


class CausalConv1d(Layer):
    """The weight of a depthwise convolution over queries, keys and values, each cut by heads."""

    weight: Tensor  # [C, W]

    def __init__(self, delta: GatedDeltaConfig) -> None:
        super().__init__()
        self.delta = delta

    def bind(self, ctx: BuildContext) -> None:
        d, self.dtype = self.delta, ctx.dtype
        key, value = d.num_k_heads * d.k_head_dim, d.num_v_heads * d.v_head_dim
        k, v = (even_shard(size, ctx.tp.rank, ctx.tp.size, "channels") for size in (key, value))
        self.ranges: Ranges = (k, (key + k[0], key + k[1]), (2 * key + v[0], 2 * key + v[1]))
        self.shape = (2 * key + value, 1, d.conv_width)

    def weights(self, prefix: str) -> list[WeightSpec]:
        scale = self.delta.conv_width**-0.5
        return [WeightSpec.of(f"{prefix}.weight", self.shape, self.dtype, ranges=self.ranges, scale=scale)]

    def load(self, parts: list[Tensor]) -> None:
        self.register_buffer("weight", parts[0][:, 0].contiguous(), persistent=False)


class QKVZLinear(Linear):
    """Queries, keys, values and z as one product, side by side. A checkpoint has their rows by key head: q, k, its values, their z.

    Rows take that order as they are read. Where a format shares a scale or a word between rows that would part, they stay, and the
    product's columns take it: a copy of them in each step.
    """

    order: Tensor | None  # int32[rows of this rank]: the product's columns, where rows stayed

    def __init__(self, hidden_size: int, delta: GatedDeltaConfig) -> None:
        super().__init__(hidden_size, delta.num_k_heads * sum(delta.by_key_head))
        self.delta = delta

    def _settle(self, ctx: BuildContext) -> None:
        first, last = even_shard(self.delta.num_k_heads, ctx.tp.rank, ctx.tp.size, "linear_num_key_heads")
        sizes = self.delta.by_key_head
        heads = [sum(sizes) * head for head in range(first, last)]
        inside = pairwise(accumulate(sizes, initial=0))
        ranges = [(head + start, head + stop) for start, stop in inside for head in heads]
        step = stored_format(self.quant, self.name).row_step(self.in_features)
        order = None
        if any(size % step for size in sizes):
            if len(heads) > 1:
                rows = [row - heads[0] for start, stop in ranges for row in range(start, stop)]
                order = torch.tensor(rows, dtype=torch.int32, device=ctx.device)
            ranges = [(heads[0], heads[-1] + sum(sizes))]
        self.register_buffer("order", order, persistent=False)
        self.parts = [("", self.out_features, tuple(ranges))]

    def forward(self, x: Tensor | Codes) -> Tensor:
        """x: [T, M] -> [T, C + Hv * Dv]."""
        y = super().forward(x)
        return y if self.order is None else y[:, self.order]


class GatedDeltaNet(PoolLayer):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464) as Qwen3-Next has it.

    Queries, keys and values go through a short convolution and the gated delta rule, whose result is normalised head by head
    and gated by z. The checkpoint lays q, k, v, z out by key head, and likewise b, a, which make beta and the decay; each rank
    holds whole key heads. What lies between the projections is four ops, each a launch where a device has kernels of them (decision 0029).
    """

    spec: GatedDeltaSpec  # for this rank; it and `plan` are known once bound
    plan: Callable[..., StatePlan]  # the op ssm.plan that belongs to the kernel chosen
    rate: Tensor  # float32[Hv]: -exp(A_log)
    dt_bias: Tensor  # float32[Hv]

    def __init__(self, cfg: ModelConfig, delta: GatedDeltaConfig) -> None:
        super().__init__()
        self.delta, self.group = delta, STATE
        d = delta
        self.in_proj_qkvz = QKVZLinear(cfg.hidden_size, delta)
        self.in_proj_ba = ColumnLinear(cfg.hidden_size, 2 * d.num_v_heads)
        self.conv1d = CausalConv1d(delta)
        self.norm = GatedRMSNorm(d.v_head_dim, cfg.rms_norm_eps)
        self.out_proj = RowLinear(d.num_v_heads * d.v_head_dim, cfg.hidden_size)

    def bind(self, ctx: BuildContext) -> None:
        d = self.delta
        k, self.v_heads = (
            even_shard(size, ctx.tp.rank, ctx.tp.size, what)
            for size, what in ((d.num_k_heads, "linear_num_key_heads"), (d.num_v_heads, "linear_num_value_heads"))
        )
        self.spec = GatedDeltaSpec(
            num_k_heads=k[1] - k[0],
            num_v_heads=self.v_heads[1] - self.v_heads[0],
            k_head_dim=d.k_head_dim,
            v_head_dim=d.v_head_dim,
            conv_width=d.conv_width,
            scale=d.k_head_dim**-0.5,
        )
        self.dtype = ctx.dtype
        dims = {"Hk": self.spec.num_k_heads, "Hv": self.spec.num_v_heads, "C": self.spec.conv_dim}
        rule = OpSite(
            op="ssm.gated_delta_rule", layer="GatedDeltaNet", dtype=dtype_name(ctx.dtype), spec=self.spec, dims=dims
        )
        group = [rule, replace(rule, op="ssm.causal_conv1d"), replace(rule, op="ssm.plan")]
        bound = ctx.table.bind_group(group, pool=self.group)
        self._rule, self._conv, self.plan = (bound[site.op].fn for site in group)
        self._gates = ctx.table.bind(replace(rule, op="ssm.gates")).fn

    def weights(self, prefix: str) -> list[WeightSpec]:
        return [
            WeightSpec.of(
                f"{prefix}.{name}", (self.delta.num_v_heads,), torch.float32, ranges=(self.v_heads,), scale=1.0
            )
            for name in ("A_log", "dt_bias")
        ]

    def load(self, parts: list[Tensor]) -> None:
        log_rate, dt_bias = parts
        self.register_buffer("rate", -log_rate.exp(), persistent=False)
        self.register_buffer("dt_bias", dt_bias, persistent=False)

    def pool_spec(self, num_layers: int, page_size: int, dtype: torch.dtype) -> StatePoolSpec:
        """The pool of this layer and its likes. A page of it is one state, and no dtype of keys and values applies."""
        s = self.spec
        return StatePoolSpec(
            group=self.group,
            num_layers=num_layers,
            conv_shape=(s.conv_width - 1, s.conv_dim),
            conv_dtype=self.dtype,
            state_shape=(s.num_v_heads, s.k_head_dim, s.v_head_dim),
        )

    def forward(self, h: Tensor, fb: ForwardBatch) -> Tensor:
        """h: [T, M] -> [T, M], of the rows kept. Writes the state after each req's last token to the pool."""
        s, pool, plan = self.spec, fb.pools[self.group], fb.plans[self.spec]
        qkv, z = self.in_proj_qkvz(h).split([s.conv_dim, s.num_v_heads * s.v_head_dim], dim=1)
        qkv = self._conv(qkv, self.conv1d.weight, None, pool, self.pool_layer, plan, activation="silu")
        key = s.num_k_heads * s.k_head_dim
        q, k, v = qkv.split([key, key, s.num_v_heads * s.v_head_dim], dim=1)
        q, k = (x.unflatten(1, (s.num_k_heads, s.k_head_dim)) for x in (q, k))
        v, z = (x.unflatten(1, (s.num_v_heads, s.v_head_dim)) for x in (v, z))
        ba = self.in_proj_ba(h).unflatten(1, (s.num_k_heads, 2, s.num_v_heads // s.num_k_heads))
        g, beta = self._gates(ba[:, :, 0], ba[:, :, 1], self.rate, self.dt_bias)
        o = self.norm(self._rule(q, k, v, g, beta, pool, self.pool_layer, s, plan), z)
        return self.out_proj(fb.kept(o.flatten(1)))  # type: ignore[no-any-return]
