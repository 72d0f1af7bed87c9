"""Multi-head latent attention: `attn.mla_paged` over a pool of latents, and which reqs of a step are rather expanded.

Absorbed, a query is taken into latent space and all heads read the one latent per token: little memory traffic, many
operations. Expanded, latents become each head's own keys and values first: few operations once many queries share the work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sglang_core.backend.pool import Pool
from sglang_core.ops.attention import attend_tiles
from sglang_core.ops.attention_plan import KEYS_PER_CHUNK, AttnBatch, AttnSpec, Plan, RaggedBatch, attn_plan, starts
from sglang_core.ops.registry import op
from sglang_core.ops.rounding import wide_dtype

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int32]
EXPANDED_ELEMENTS = 1 << 24  # keys and values of a cached prefix that exist at once


@dataclass(frozen=True, kw_only=True, slots=True)
class MLASpec:
    """One kind of latent attention layer, for this rank; causal. Hashable; the question that kernel selection asks."""

    num_heads: int
    rank: int  # of the latent: kv_lora_rank
    nope_dim: int  # of a head's query and key, without the rotated part
    rope_dim: int  # of the rotated part, whose key all heads share
    v_head_dim: int
    scale: float
    kv_dtype: str = "auto"  # of the pool, one of KV_DTYPES; auto: that of the activations
    tree: bool = False  # a step may bring a tree mask

    @property
    def latent(self) -> AttnSpec:
        """The attention that the absorbed form is: one KV head, whose values are the first `rank` dims of its keys."""
        return AttnSpec(
            num_heads=self.num_heads,
            num_kv_heads=1,
            head_dim=self.rank + self.rope_dim,
            v_head_dim=self.rank,
            scale=self.scale,
            kv_dtype=self.kv_dtype,
            tree=self.tree,
        )

    @property
    def expanded(self) -> AttnSpec:
        """The attention that the expanded form is over a step's own tokens: as many KV heads as heads."""
        return AttnSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.nope_dim + self.rope_dim,
            v_head_dim=self.v_head_dim,
            scale=self.scale,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixChunk:
    """Cached tokens that are expanded together, of neighbouring reqs, and the queries that see them all."""

    slots: Tensor  # int32[S]
    batch: RaggedBatch  # the chunk's reqs, with their keys in it
    rows: tuple[int, int]  # their queries among the expanded ones, half-open


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpandPlan:
    """The reqs whose keys and values are expanded."""

    tokens: Tensor | None  # int32[Te]: their rows among the step's; None: all
    own: RaggedBatch  # each req's new tokens, to each other
    chunks: tuple[PrefixChunk, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MLAPlan:
    """A step divided: `absorbed` is a plan of the op attn.mla_plan over its reqs alone, whose tokens are packed anew."""

    slot_mapping: Tensor  # int32[T], of every token
    absorbed: Plan | None
    absorbed_tokens: Tensor | None  # int32[Ta]: rows among the step's; None: all
    expanded: ExpandPlan | None


@op("kv.write_mla")
def kv_write_mla(c_kv: Tensor, k_pe: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """c_kv: [T, rank], k_pe: [T, rope_dim], slot_mapping: int32[T]. Rounds to the pool's dtype. Slots repeat only in page 0."""
    pool.scatter(layer, slot_mapping, c_kv[:, None], k_pe[:, None])


@op("attn.mla_plan", host=True)
def attn_mla_plan(spec: MLASpec, batch: AttnBatch, device: torch.device, out: Plan | None = None) -> Plan:
    """Plan one step of attn.mla_paged, as attn.plan does for attn.paged."""
    return attn_plan(spec.latent, batch, device, out)


@op("attn.mla_paged")
def attn_mla_paged(
    q_nope: Tensor,
    q_pe: Tensor,
    c_kv: Tensor | None,
    k_pe: Tensor | None,
    pool: Pool,
    layer: int,
    spec: MLASpec,
    plan: Plan,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Write c_kv, k_pe at plan.slot_mapping, then attend over the pool's latents: extend, decode and mixed alike.

    q_nope: [T, Hq, rank], in latent space already; q_pe: [T, Hq, rope_dim], rotated; c_kv: [T, rank], normalised;
    k_pe: [T, rope_dim], rotated -> o: [T, Hq, rank], still in latent space (, lse: float32[T, Hq], natural log).
    c_kv = k_pe = None: all latents are in the pool already. Rounding and queries that see no key: as `attn.paged`.
    """
    if c_kv is not None and k_pe is not None:
        kv_write_mla(c_kv, k_pe, pool, layer, plan.slot_mapping)
    dtype = wide_dtype(q_nope.dtype)

    def read(slots: Tensor) -> tuple[Tensor, Tensor]:
        latent, rotated = pool.gather_heads(layer, slots, dtype)
        return torch.cat([latent, rotated], dim=-1), latent

    o, s = attend_tiles(torch.cat([q_nope, q_pe], dim=-1), read, spec.latent, plan)
    return (o, s) if lse else o


@op("attn.mla_project")
def attn_mla_project(x: Tensor, weight: Tensor) -> Tensor:
    """A matrix per head, into latent space or out of it. x: [T, Hq, I], weight: [Hq, I, O] -> [T, Hq, O] in x.dtype."""
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


def plan_mla(
    spec: MLASpec, batch: AttnBatch, device: torch.device, *, plan_absorbed: Callable[..., Plan] = attn_mla_plan
) -> MLAPlan:
    """Divide a step: see `is_expanded`. `plan_absorbed` is the op attn.mla_plan that belongs to the kernel chosen."""
    expand = is_expanded(spec, batch)
    slot_mapping = batch.slot_mapping_cpu.to(device)
    if not expand.any():
        absorbed = plan_absorbed(spec, batch, device)
        return MLAPlan(slot_mapping=slot_mapping, absorbed=absorbed, absorbed_tokens=None, expanded=None)
    if expand.all():
        expanded = _plan_expanded(spec, batch, None, device)
        return MLAPlan(slot_mapping=slot_mapping, absorbed=None, absorbed_tokens=None, expanded=expanded)
    rest, rest_tokens = _part(batch, ~expand)
    ours, tokens = _part(batch, expand)
    return MLAPlan(
        slot_mapping=slot_mapping,
        absorbed=plan_absorbed(spec, rest, device),
        absorbed_tokens=rest_tokens.to(device),
        expanded=_plan_expanded(spec, ours, tokens.to(device), device),
    )


def is_expanded(spec: MLASpec, batch: AttnBatch) -> Bools:
    """bool[R]: the reqs for which expanding costs fewer multiplications. Never a decode, a tree, nor anything in a bucket.

    It saves 2 * rank - nope_dim - v_head_dim a head for each query and key, and costs rank * (nope_dim + v_head_dim) a head
    for each cached token; for the new tokens, that is what taking queries and results into and out of latent space costs.
    It looks at a req alone: what a req gets does not depend on its neighbours.
    """
    prefix = batch.prefix_lens_cpu.numpy().astype(np.int64)
    extend = np.diff(batch.cu_extend_cpu.numpy()).astype(np.int64)
    saved = (extend * prefix + extend * (extend + 1) // 2) * (2 * spec.rank - spec.nope_dim - spec.v_head_dim)
    worth: Bools = (extend > 1) & (saved > prefix * spec.rank * (spec.nope_dim + spec.v_head_dim))
    return np.zeros_like(worth) if batch.static or batch.tree_mask_cpu is not None else worth


def _part(batch: AttnBatch, chosen: Bools) -> tuple[AttnBatch, Tensor]:
    """The batch of the chosen reqs alone, and the rows of its tokens in the whole: int32, on the host."""
    extend = np.diff(batch.cu_extend_cpu.numpy())
    kept = np.repeat(chosen, extend)
    tokens = torch.from_numpy(np.flatnonzero(kept).astype(np.int32))
    reqs = torch.from_numpy(np.flatnonzero(chosen))
    part = replace(
        batch,
        cu_extend_cpu=starts(extend[chosen]),
        prefix_lens_cpu=batch.prefix_lens_cpu[reqs],
        seq_lens_cpu=batch.seq_lens_cpu[reqs],
        page_table_cpu=batch.page_table_cpu[reqs],
        slot_mapping_cpu=batch.slot_mapping_cpu[tokens],
        num_tokens=len(tokens),
        num_reqs=len(reqs),
        max_extend=int(extend[chosen].max()),
    )
    return part, tokens


def _plan_expanded(spec: MLASpec, batch: AttnBatch, tokens: Tensor | None, device: torch.device) -> ExpandPlan:
    size = EXPANDED_ELEMENTS // (spec.num_heads * (spec.nope_dim + spec.rope_dim + spec.v_head_dim))
    ends = np.cumsum(batch.prefix_lens_cpu.numpy(), dtype=np.int64)
    total, size = int(ends[-1]), max(size, KEYS_PER_CHUNK)
    chunks = tuple(
        _prefix_chunk(batch, ends, start, min(start + size, total), device) for start in range(0, total, size)
    )
    extend = np.diff(batch.cu_extend_cpu.numpy())
    return ExpandPlan(tokens=tokens, own=RaggedBatch.of(extend, extend, device), chunks=chunks)


def _prefix_chunk(
    batch: AttnBatch, ends: npt.NDArray[np.int64], start: int, stop: int, device: torch.device
) -> PrefixChunk:
    """Of all prefixes laid end to end, the tokens [start, stop). ends: [R]."""
    first, last = int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, stop, "left"))
    reqs = np.arange(first, last + 1)
    begins = (ends - batch.prefix_lens_cpu.numpy())[reqs]
    lens = np.minimum(ends[reqs], stop) - np.maximum(begins, start)
    req = np.repeat(reqs, lens)
    position = np.arange(start, stop) - np.repeat(begins, lens)
    page = batch.page_table_cpu.numpy()[req, position // batch.page_size]
    slots = page * batch.page_size + position % batch.page_size
    cu = batch.cu_extend_cpu.numpy()[first : last + 2]
    return PrefixChunk(
        slots=torch.from_numpy(slots.astype(np.int32)).to(device),
        batch=RaggedBatch.of(np.diff(cu), lens, device),
        rows=(int(cu[0]), int(cu[-1])),
    )
