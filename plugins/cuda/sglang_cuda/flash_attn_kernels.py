"""attn.ragged by FlashAttention-2. Importing this imports it."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func
from sglang_triton import attention
from torch import Tensor

from sglang_core.api.ops import AttnSpec


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    spec: AttnSpec,
    *,
    max_q: int,
    max_k: int,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k, v: [Tk, Hk, D], cu_q, cu_k: int32[R + 1] -> o: [T, Hq, D] (, lse: float32[T, Hq], natural log)."""

    def launch(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, o: Tensor, sums: Tensor | None, spec: AttnSpec, max_q: int
    ) -> None:  # fmt: skip
        """As `attention.attend_packed`."""
        if not k.shape[0]:
            return
        got, got_sums, _ = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_q,
            cu_k,
            max(max_q, 2),  # of 1 it takes it that every req has a query
            max_k,
            softmax_scale=spec.scale,
            causal=spec.causal,
            window_size=(spec.window - 1, 0) if spec.window else (-1, -1),
            softcap=spec.soft_cap or 0.0,
            return_attn_probs=True,
        )
        # It leaves rows of no req as they were allocated, and gives a row without keys an lse of +inf.
        real = torch.arange(q.shape[0], dtype=torch.int32, device=q.device) < cu_q[-1]
        torch.where(real[:, None, None], got, o, out=o)
        if sums is not None:
            torch.where(real[:, None] & got_sums.mT.isfinite(), got_sums.mT, sums, out=sums)

    return attention.ragged(q, k, v, cu_q, cu_k, spec, max_q=max_q, max_k=max_k, lse=lse, launch=launch)
