"""The attention layer of a decoder: projections, head norms, rotary embedding, attention over the KV pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.layers.build import BuildContext, PoolLayer, WeightSpec, dtype_name
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.kv_scales import KVScales
from sglang_core.layers.linear import QKVLinear, RowLinear
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.norm import RMSNorm
from sglang_core.layers.rope import RopeTable
from sglang_core.ops.attention import AttnSpec, Plan
from sglang_core.ops.codes import Codes
from sglang_core.ops.rope_paged import HeadNorms
from sglang_core.parallel.groups import shard_heads
from sglang_core.types import FULL, window_group


class Attention(PoolLayer):
    """Self-attention of layer `layer_id`.

    With `cfg.attn_output_gate`, q_proj has a query and a gate for each head, one after the other; the sigmoid of the gate
    multiplies the head's output. With `cfg.attn_sinks` it has a weight `sinks`: [num_heads], the logits of keys without a
    value. They are held in float32, in which softmax runs, whatever the checkpoint has them in.
    """

    spec: AttnSpec  # for this rank; it and `plan` are known once bound
    plan: Callable[..., Plan]  # the op attn.plan that belongs to the kernel chosen
    sinks: Tensor | None  # float32[Hq]

    def __init__(self, cfg: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.cfg, self.layer_id, window = cfg, layer_id, cfg.windows[layer_id]
        self.group = FULL if window is None else window_group(window)
        self.qkv_proj = QKVLinear(
            cfg.hidden_size,
            cfg.num_heads * (2 if cfg.attn_output_gate else 1),
            cfg.num_kv_heads,
            cfg.head_dim,
            bias=cfg.qkv_bias,
            fused=cfg.fused_projections,
        )
        self.o_proj = RowLinear(cfg.num_heads * cfg.head_dim, cfg.hidden_size, bias=cfg.o_bias)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps, offset=cfg.norm_offset)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps, offset=cfg.norm_offset)
        self.rotary_emb = RopeTable(cfg.ropes[layer_id])
        self.register_buffer("sinks", None, persistent=False)
        self.kv_scales = KVScales(cfg.num_kv_heads, cfg.kv_scheme)

    def bind(self, ctx: BuildContext) -> None:
        cfg = self.cfg
        heads = shard_heads(cfg.num_heads, cfg.num_kv_heads, ctx.tp.rank, ctx.tp.size)
        self.heads, self.kv_scales.heads = heads, heads.kv
        self.spec = AttnSpec(
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=cfg.head_dim,
            v_head_dim=cfg.head_dim,
            scale=cfg.query_scale,
            window=cfg.windows[self.layer_id],
            soft_cap=cfg.attn_soft_cap,
            has_sinks=cfg.attn_sinks,
            kv_dtype=ctx.kv_dtype,
        )
        dims = {"Hq": heads.num_heads, "Hk": heads.num_kv_heads, "D": cfg.head_dim}
        paged = OpSite(op="attn.paged", layer="Attention", dtype=dtype_name(ctx.dtype), spec=self.spec, dims=dims)
        norms = [self.q_norm.site("norm.rms", ctx)] if cfg.qk_norm else []
        whole = replace(paged, op="attn.rope_paged", parts=(*norms, self.rotary_emb.site(ctx), paged))
        bound = ctx.table.bind_group([paged, replace(paged, op="attn.plan"), whole], pool=self.group)
        self._attend, self.plan = bound["attn.rope_paged"].fn, bound["attn.plan"].fn

    def weights(self, prefix: str) -> list[WeightSpec]:
        if not self.cfg.attn_sinks:
            return []
        heads = self.heads.q
        return [WeightSpec.of(f"{prefix}.sinks", (self.cfg.num_heads,), torch.float32, ranges=(heads,), scale=1.0)]

    def load(self, parts: list[Tensor]) -> None:
        (self.sinks,) = parts

    def pool_spec(self, num_layers: int, page_size: int, dtype: torch.dtype) -> PoolSpec:
        """The pool of this layer and its likes."""
        return PoolSpec(
            group=self.group,
            window=self.spec.window,
            num_layers=num_layers,
            page_size=page_size,
            num_kv_heads=self.spec.num_kv_heads,
            head_dim=self.spec.head_dim,
            v_head_dim=self.spec.v_head_dim,
            dtype=dtype,
        )

    def prepare_pool(self, pool: Pool) -> None:
        self.kv_scales.hand_to(pool, self.pool_layer)

    def forward(self, h: Tensor | Codes, fb: ForwardBatch) -> Tensor:
        """h: [T, M], or codes of it -> [T, M], of the rows kept. Writes this step's keys and values to the pool."""
        q, k, v = self.qkv_proj.forward_split(h)
        gate = None
        if self.cfg.attn_output_gate:
            q, gate = q.view(q.shape[0], -1, 2, q.shape[2]).unbind(2)
        norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.cfg.qk_norm else None
        o = self._attend(
            q,
            k,
            v,
            fb.positions,
            self.rotary_emb.table,
            self.rotary_emb.spec,
            fb.pools[self.group],
            self.pool_layer,
            self.spec,
            fb.plans[self.spec],
            head_norms=norms,
            sinks=self.sinks,
        )
        if gate is not None:
            o = (o.float() * gate.float().sigmoid()).to(o.dtype)
        return self.o_proj(fb.kept(o.flatten(1)))  # type: ignore[no-any-return]
