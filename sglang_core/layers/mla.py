"""Multi-head latent attention (DeepSeek): low-rank projections, rotary embedding on a part of each head, latents in the pool."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.layers.build import BuildContext, PoolLayer, dtype_name
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.kv_scales import KVScales
from sglang_core.layers.linear import ColumnLinear, Linear, RowLinear
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.norm import RMSNorm
from sglang_core.layers.rope import Rope
from sglang_core.ops.mla import ExpandPlan, MLAPlan, MLASpec, PrefixChunk, plan_mla
from sglang_core.ops.weight import PackedWeight
from sglang_core.parallel.groups import even_shard
from sglang_core.types import FULL

LATENT_NORM_EPS = 1e-6  # whatever the model's other norms have


@dataclass(frozen=True, kw_only=True, slots=True)
class MLAConfig:
    """The sizes of latent attention. Rope and the scale of scores are the model's, as of any attention."""

    q_rank: int | None  # None: queries are projected at once
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_head_dim: int


class LatentUpLinear(ColumnLinear):
    """Latents to each head's keys (without the rotated part) and values: [T, rank] -> [T, Hq * (nope_dim + v_head_dim)].

    Keeps the same weights a head at a time too, to take queries into latent space and results out of it.
    """

    key_weight: Tensor  # [Hq, nope_dim, rank]
    value_weight: Tensor  # [Hq, rank, v_head_dim]
    takes_adapters = False
    dense_only = "its heads are taken apart"

    def __init__(self, num_heads: int, mla: MLAConfig) -> None:
        super().__init__(mla.kv_rank, num_heads * (mla.nope_dim + mla.v_head_dim))
        self.mla = mla

    def bind(self, ctx: BuildContext) -> None:
        super().bind(ctx)
        self.packs = None  # not all: what it keeps a head at a time is canonical

    def _take(self, weight: PackedWeight) -> None:
        super()._take(weight)
        per_head = weight["weight"].view(-1, self.mla.nope_dim + self.mla.v_head_dim, self.mla.kv_rank)
        nope = self.mla.nope_dim
        self.register_buffer("key_weight", per_head[:, :nope], persistent=False)
        self.register_buffer("value_weight", per_head[:, nope:].transpose(1, 2), persistent=False)


class LatentAttention(PoolLayer):
    """Self-attention of layer `layer_id`. Heads are divided over ranks; every rank has all latents."""

    spec: MLASpec  # for this rank; it and `plan` are known once bound
    plan: Callable[..., MLAPlan]

    def __init__(self, cfg: ModelConfig, mla: MLAConfig, layer_id: int) -> None:
        super().__init__()
        self.cfg, self.mla, self.group = cfg, mla, FULL
        q_size = cfg.num_heads * (mla.nope_dim + mla.rope_dim)
        if mla.q_rank is None:
            self.q_proj = ColumnLinear(cfg.hidden_size, q_size)
        else:
            self.q_a_proj = Linear(cfg.hidden_size, mla.q_rank, bias=cfg.qkv_bias)
            self.q_a_layernorm = RMSNorm(mla.q_rank, LATENT_NORM_EPS)
            self.q_b_proj = ColumnLinear(mla.q_rank, q_size)
        self.kv_a_proj_with_mqa = Linear(cfg.hidden_size, mla.kv_rank + mla.rope_dim, bias=cfg.qkv_bias)
        self.kv_a_layernorm = RMSNorm(mla.kv_rank, LATENT_NORM_EPS)
        self.kv_b_proj = LatentUpLinear(cfg.num_heads, mla)
        self.o_proj = RowLinear(cfg.num_heads * mla.v_head_dim, cfg.hidden_size, bias=cfg.o_bias)
        self.rotary_emb = Rope(cfg.ropes[layer_id])
        self.kv_scales = KVScales(1, cfg.kv_scheme, latent=True)

    def bind(self, ctx: BuildContext) -> None:
        mla = self.mla
        first, last = even_shard(self.cfg.num_heads, ctx.tp.rank, ctx.tp.size, "num_attention_heads")
        self.spec = MLASpec(
            num_heads=last - first,
            rank=mla.kv_rank,
            nope_dim=mla.nope_dim,
            rope_dim=mla.rope_dim,
            v_head_dim=mla.v_head_dim,
            scale=self.cfg.query_scale,
            kv_dtype=ctx.kv_dtype,
        )
        dims = {"Hq": self.spec.num_heads, "Hk": 1, "D": mla.kv_rank + mla.rope_dim}
        paged = OpSite(
            op="attn.mla_paged", layer="LatentAttention", dtype=dtype_name(ctx.dtype), spec=self.spec, dims=dims
        )
        bound = ctx.table.bind_group(
            [paged, replace(paged, op="attn.mla_plan"), replace(paged, op="kv.write_mla")], pool=self.group
        )
        self._attend, self._write = bound["attn.mla_paged"].fn, bound["kv.write_mla"].fn
        self.plan = functools.partial(plan_mla, plan_absorbed=bound["attn.mla_plan"].fn)
        self._project = ctx.table.bind(replace(paged, op="attn.mla_project")).fn
        own, seen = self.spec.expanded, replace(self.spec.expanded, causal=False)
        dims = {"Hq": own.num_heads, "Hk": own.num_kv_heads, "D": own.head_dim}
        ragged = OpSite(op="attn.ragged", layer="LatentAttention", dtype=dtype_name(ctx.dtype), spec=own, dims=dims)
        self._attend_new = ctx.table.bind(ragged).fn
        self._attend_prefix = ctx.table.bind(replace(ragged, spec=seen)).fn
        self._merge = ctx.table.bind(replace(ragged, op="attn.merge")).fn
        self._own, self._seen = own, seen

    def pool_spec(self, num_layers: int, page_size: int, dtype: torch.dtype) -> PoolSpec:
        """The pool of this layer and its likes."""
        return PoolSpec(
            kind="mla",
            group=self.group,
            num_layers=num_layers,
            page_size=page_size,
            num_kv_heads=1,
            head_dim=self.mla.kv_rank,
            v_head_dim=self.mla.rope_dim,
            dtype=dtype,
        )

    def prepare_pool(self, pool: Pool) -> None:
        self.kv_scales.hand_to(pool, self.pool_layer)

    def forward(self, h: Tensor, fb: ForwardBatch) -> Tensor:
        """h: [T, M] -> [T, M], of the rows kept. Writes this step's latents to the pool."""
        q_nope, q_pe = self._queries(h)
        c_kv, k_pe = self.kv_a_proj_with_mqa(h).split([self.mla.kv_rank, self.mla.rope_dim], dim=-1)
        c_kv = self.kv_a_layernorm.normalize(c_kv)
        q_pe, k_pe = self.rotary_emb(q_pe, k_pe[:, None], fb.positions)
        k_pe = k_pe[:, 0]
        plan, pool = fb.plans[self.spec], fb.pools[self.group]
        assert isinstance(plan, MLAPlan), "a plan of another kind of attention"
        if plan.expanded is None:
            o = self._absorbed(q_nope, q_pe, c_kv, k_pe, pool, plan)
        else:
            self._write(c_kv, k_pe, pool, self.pool_layer, plan.slot_mapping)
            o = self._mixed(q_nope, q_pe, pool, plan, plan.expanded)
        return self.o_proj(fb.kept(o.flatten(1)))  # type: ignore[no-any-return]

    def _queries(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """-> [T, Hq, nope_dim], [T, Hq, rope_dim]."""
        if self.mla.q_rank is None:
            q = self.q_proj(h)
        else:
            q = self.q_b_proj(self.q_a_layernorm.normalize(self.q_a_proj(h)))
        q = q.view(-1, self.spec.num_heads, self.mla.nope_dim + self.mla.rope_dim)
        return q[..., : self.mla.nope_dim], q[..., self.mla.nope_dim :]

    def _absorbed(
        self, q_nope: Tensor, q_pe: Tensor, c_kv: Tensor | None, k_pe: Tensor | None, pool: Pool, plan: MLAPlan
    ) -> Tensor:
        """-> [T, Hq, v_head_dim]. c_kv, k_pe: None where they are in the pool already."""
        q_latent = self._project(q_nope, self.kv_b_proj.key_weight)
        o = self._attend(q_latent, q_pe, c_kv, k_pe, pool, self.pool_layer, self.spec, plan.absorbed)
        return self._project(o, self.kv_b_proj.value_weight)  # type: ignore[no-any-return]

    def _mixed(self, q_nope: Tensor, q_pe: Tensor, pool: Pool, plan: MLAPlan, expanded: ExpandPlan) -> Tensor:
        """-> [T, Hq, v_head_dim], each req by its own path. The pool has this step's latents."""
        if (ours := expanded.tokens) is None:
            return self._expanded(torch.cat([q_nope, q_pe], dim=-1), pool, plan.slot_mapping, expanded)
        rest = plan.absorbed_tokens
        assert rest is not None, "some reqs are expanded and some are not"
        absorbed = self._absorbed(q_nope[rest], q_pe[rest], None, None, pool, plan)
        q = torch.cat([q_nope[ours], q_pe[ours]], dim=-1)
        o = q_nope.new_empty(q_nope.shape[0], self.spec.num_heads, self.mla.v_head_dim)
        o = o.index_put((rest,), absorbed)
        return o.index_put((ours,), self._expanded(q, pool, plan.slot_mapping[ours], expanded))

    def _expanded(self, q: Tensor, pool: Pool, own: Tensor, plan: ExpandPlan) -> Tensor:
        """q: [T, Hq, nope_dim + rope_dim], own: int32[T], the tokens' slots -> [T, Hq, v_head_dim].

        This step's tokens first, as the pool rounded them; then cached ones, chunk by chunk.
        """
        k, v = self._expand(pool, own, q.dtype)
        o, lse = self._attend_new(q, k, v, plan.own, self._own, lse=True)
        for chunk in plan.chunks:
            start, stop = chunk.rows
            seen = self._attend_chunk(q[start:stop], pool, chunk)
            part, part_lse = self._merge(o[start:stop], lse[start:stop], *seen)
            o = torch.cat([o[:start], part, o[stop:]])
            lse = torch.cat([lse[:start], part_lse, lse[stop:]])
        return o  # type: ignore[no-any-return]

    def _attend_chunk(self, q: Tensor, pool: Pool, chunk: PrefixChunk) -> tuple[Tensor, Tensor]:
        k, v = self._expand(pool, chunk.slots, q.dtype)
        o, lse = self._attend_prefix(q, k, v, chunk.batch, self._seen, lse=True)
        return o, lse

    def _expand(self, pool: Pool, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """slots: int32[S] -> k: [S, Hq, nope_dim + rope_dim], v: [S, Hq, v_head_dim], in dtype."""
        c_kv, k_pe = (x[:, 0].to(dtype) for x in pool.gather(self.pool_layer, slots))
        heads, dims = self.spec.num_heads, [self.mla.nope_dim, self.mla.v_head_dim]
        k, v = self.kv_b_proj(c_kv).view(-1, heads, sum(dims)).split(dims, dim=-1)
        return torch.cat([k, k_pe[:, None].expand(-1, heads, -1)], dim=-1), v
