"""attn.ragged by npu_fused_infer_attention_score_v2 over packed keys and values.

All reqs are one call in layout TND, where that is documented for the heads; elsewhere each is a call to itself. Heads are widened with zeros to dims
that are documented. Queries that see no key are in no call: what they would get is not said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch_npu
from torch import Tensor
from torch.nn.functional import pad

from sglang_core.api.ops import AttnSpec, RaggedBatch
from sglang_npu.attention import BAND, EVER, triangle
from sglang_npu.attention_plan import MOST_PACKED
from sglang_npu.graphs import refuse_capture
from sglang_npu.kernels import ragged_dims


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Reqs of one call, whose queries lie in a row, and whose keys do."""

    rows: slice
    keys: slice
    q_ends: list[int]  # of each req's queries, counted from the first
    k_ends: list[int]


def ragged(
    q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, spec: AttnSpec, *, lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [Tk, Hk, D], v: [Tk, Hk, Dv] -> o: [T, Hq, Dv] (, lse: float32[T, Hq], natural log).

    Raises RuntimeError in a capture.
    """
    refuse_capture("attn.ragged: which calls it makes depends on the lengths of reqs")
    dims = ragged_dims(spec.head_dim, spec.v_head_dim, str(q.dtype).removeprefix("torch."))
    q, k, v = _widened(q, dims.head), _widened(k, dims.head), _widened(v, dims.value)
    o = q.new_zeros(q.shape[0], spec.num_heads, spec.v_head_dim)
    sums = torch.full(o.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    for run in runs(batch, spec, packed=dims.packed):
        part, part_sums = _attend(q[run.rows], k[run.keys], v[run.keys], run, spec, packed=dims.packed, lse=lse)
        o[run.rows] = part[..., : spec.v_head_dim]
        if lse:
            sums[run.rows] = part_sums
    return (o, sums) if lse else o


def runs(batch: RaggedBatch, spec: AttnSpec, *, packed: bool) -> Iterator[Run]:
    """The calls: of as many reqs as lie in a row if they are packed, else of one each. Causal queries are no longer than their keys then."""
    reqs: list[tuple[int, int, int, int]] = []
    for (q0, q1), (k0, k1) in zip(*(pairwise(cu.tolist()) for cu in (batch.cu_q_cpu, batch.cu_k_cpu)), strict=True):
        if spec.causal:
            q0 = max(q0, q1 - (k1 - k0))  # those before see no key
        if q0 == q1 or k0 == k1:
            continue
        if spec.window is not None and not packed:
            k0 = max(k0, k1 - (q1 - q0) - spec.window + 1)  # a query alone has no band
        if reqs and not (packed and len(reqs) < MOST_PACKED and (q0, k0) == (reqs[-1][1], reqs[-1][3])):
            yield _run(reqs)
            reqs = []
        reqs.append((q0, q1, k0, k1))
    if reqs:
        yield _run(reqs)


def _run(reqs: list[tuple[int, int, int, int]]) -> Run:
    (q0, _, k0, _), (_, q1, _, k1) = reqs[0], reqs[-1]
    return Run(
        rows=slice(q0, q1),
        keys=slice(k0, k1),
        q_ends=[end - q0 for _, end, _, _ in reqs],
        k_ends=[end - k0 for *_, end in reqs],
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, run: Run, spec: AttnSpec, *, packed: bool, lse: bool
) -> tuple[Tensor, Tensor]:
    """-> o: [T, Hq, Dv], float32[T, Hq], which means nothing without `lse`."""
    mask: dict[str, Any] = {}
    if spec.causal and (packed or q.shape[0] > 1):
        before = EVER if spec.window is None else spec.window - 1
        mask = {"atten_mask": triangle(q.device), "sparse_mode": BAND, "pre_tokens": before, "next_tokens": 0}
    o, sums = torch_npu.npu_fused_infer_attention_score_v2(
        *((q, k, v) if packed else (q[None], k[None], v[None])),
        **mask,
        actual_seq_qlen=run.q_ends,
        actual_seq_kvlen=run.k_ends,
        num_query_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        softmax_scale=spec.scale,
        input_layout="TND" if packed else "BSND",
        return_softmax_lse=lse,
    )
    if packed:
        return o, sums[:, :, 0] if lse else sums
    return o[0], sums[0, :, :, 0].t() if lse else sums


def _widened(x: Tensor, dim: int) -> Tensor:
    """[T, H, D] -> [T, H, dim], contiguous."""
    return pad(x, (0, dim - x.shape[2])).contiguous()
