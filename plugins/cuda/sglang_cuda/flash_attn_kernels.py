"""attn.ragged by FlashAttention-2. Importing this imports it."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func
from sglang_triton import attention
from torch import Tensor

from sglang_core.api.ops import AttnSpec, RaggedBatch


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: RaggedBatch,
    spec: AttnSpec,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k, v: [Tk, Hk, D] -> o: [T, Hq, D] (, lse: float32[T, Hq], natural log)."""

    def launch(
        q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, o: Tensor, sums: Tensor | None, spec: AttnSpec
    ) -> None:
        """As `attention.attend_packed`."""
        if not k.shape[0]:
            return
        got, got_sums, _ = flash_attn_varlen_func(
            q,
            k,
            v,
            batch.cu_q,
            batch.cu_k,
            max(batch.max_q, 2),  # of 1 it takes it that every req has a query
            batch.max_k,
            softmax_scale=spec.scale,
            causal=spec.causal,
            window_size=(spec.window - 1, 0) if spec.window else (-1, -1),
            softcap=spec.soft_cap or 0.0,
            return_attn_probs=True,
        )
        # It leaves rows of no req as they were allocated, and gives a row without keys an lse of +inf.
        real = torch.arange(q.shape[0], dtype=torch.int32, device=q.device) < batch.cu_q[-1]
        torch.where(real[:, None, None], got, o, out=o)
        if sums is not None:
            torch.where(real[:, None] & got_sums.mT.isfinite(), got_sums.mT, sums, out=sums)

    return attention.ragged(q, k, v, batch, spec, lse=lse, launch=launch)
