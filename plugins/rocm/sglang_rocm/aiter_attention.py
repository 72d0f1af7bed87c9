"""attn.ragged by AITER. Importing this imports it."""

from __future__ import annotations

import torch
from aiter import flash_attn_varlen_func
from sglang_triton import attention
from torch import Tensor

from sglang_core.api.ops import AttnSpec, RaggedBatch

UNIT = 8  # numbers of 16 bits in the 16 bytes that its kernels load at a time
REACH = 2**31  # bytes of keys: beyond, its kernels' offsets are not known to be wide enough


def reaches_too_far(num_keys: int, spec: AttnSpec) -> bool:
    return num_keys * spec.num_kv_heads * spec.head_dim * 2 >= REACH


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: RaggedBatch,
    spec: AttnSpec,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: bfloat16[T, Hq, D], k: [Tk, Hk, D], v: [Tk, Hk, Dv] -> o: [T, Hq, Dv] (, lse: float32[T, Hq], natural log)."""

    def launch(
        q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, o: Tensor, sums: Tensor | None, spec: AttnSpec
    ) -> None:
        """As `attention.attend_packed`."""
        if not k.shape[0]:
            return
        if reaches_too_far(k.shape[0], spec):
            attention.attend_packed(q, k, v, batch, o, sums, spec)
            return
        found = flash_attn_varlen_func(
            aligned(q),
            aligned(k),
            aligned(v),
            batch.cu_q,
            batch.cu_k,
            batch.max_q,
            batch.max_k,
            softmax_scale=spec.scale,
            causal=spec.causal,
            return_lse=sums is not None,
        )
        got, got_sums = (found, None) if sums is None else found
        # What it leaves in rows of no req, and in those that see no key, was different from release to release.
        seen = sees_a_key(q.shape[0], batch.cu_q, batch.cu_k, causal=spec.causal)[:, None]
        torch.where(seen[..., None], got, o, out=o)
        if sums is not None:
            assert got_sums.shape == sums.mT.shape, f"sums of {tuple(got_sums.shape)} for {tuple(o.shape)}"
            torch.where(seen, got_sums.mT, sums, out=sums)

    return attention.ragged(q, k, v, batch, spec, lse=lse, launch=launch)


def sees_a_key(num_rows: int, cu_q: Tensor, cu_k: Tensor, *, causal: bool) -> Tensor:
    """cu_q, cu_k: int32[R + 1] -> bool[num_rows]. The last query of a req sees all of its keys; causal, each before it sees one less."""
    row = torch.arange(num_rows, dtype=torch.int32, device=cu_q.device)
    req = torch.searchsorted(cu_q[1:], row, right=True).clamp_(max=cu_q.shape[0] - 2)
    keys = (cu_k[1:] - cu_k[:-1])[req]
    hidden = cu_q[req + 1] - row - 1 if causal else 0
    return (row < cu_q[-1]) & (keys > hidden)


def aligned(x: Tensor) -> Tensor:
    """x: [n, H, D] -> the same, each head at a multiple of 16 bytes; a copy where it is not so."""
    apart = x.stride(-1) != 1 or x.stride(0) % UNIT or x.stride(1) % UNIT or x.data_ptr() % (UNIT * x.element_size())
    return x.clone(memory_format=torch.contiguous_format) if apart else x
