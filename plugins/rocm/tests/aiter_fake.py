"""AITER is not installed here: its one function that is called, with the parameters of its releases 0.1.21 and 0.1.22 and a body from its documentation, stands for it."""

from __future__ import annotations

import inspect
from typing import Any

import torch

# Of flash_attn_varlen_func, as aiter/ops/mha.py had them between those releases.
REQUIRED = ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
OPTIONAL = {
    "min_seqlen_q": 0,
    "dropout_p": 0.0,
    "softmax_scale": None,
    "logits_soft_cap": 0.0,
    "causal": False,
    "window_size": (-1, -1, 0),
    "bias": None,
    "alibi_slopes": None,
    "deterministic": False,
    "return_lse": False,
    "return_attn_probs": False,
    "how_v3_bf16_cvt": 1,
    "block_table": None,
    "out": None,
    "cu_seqlens_q_padded": None,
    "cu_seqlens_k_padded": None,
    "sink_ptr": None,
}
KIND = inspect.Parameter.POSITIONAL_OR_KEYWORD
SIGNATURE = inspect.Signature(
    [*(inspect.Parameter(n, KIND) for n in REQUIRED), *(inspect.Parameter(n, KIND, default=d) for n, d in OPTIONAL.items())]
)  # fmt: skip


def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
    """Rows of no req, and those that see no key, are whatever was there. lse: [Hq, T], natural log."""
    bound = SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    assert all(
        given[name] == default
        for name, default in OPTIONAL.items()
        if name not in ("softmax_scale", "causal", "return_lse")
    )
    q, k, v, cu_q, cu_k = (given[name] for name in REQUIRED[:5])
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and cu_q.dtype == cu_k.dtype == torch.int32
    assert (q.shape[-1], v.shape[-1]) in ((128, 128), (192, 128)) and k.shape[0] == v.shape[0]
    assert all(x.stride(-1) == 1 and x.stride(0) % 8 == x.stride(1) % 8 == x.data_ptr() % 16 == 0 for x in (q, k, v))
    assert cu_q.is_contiguous() and cu_k.is_contiguous() and len(cu_q) == len(cu_k) > 1
    lens = [cu.diff().tolist() for cu in (cu_q, cu_k)]
    assert max(lens[0]) <= given["max_seqlen_q"] and max(lens[1]) <= given["max_seqlen_k"]
    group = q.shape[1] // k.shape[1]
    out = q.new_full((*q.shape[:2], v.shape[-1]), torch.nan)
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    for r, (num_q, num_k) in enumerate(zip(*lens, strict=True)):
        at_q, at_k = slice(int(cu_q[r]), int(cu_q[r + 1])), slice(int(cu_k[r]), int(cu_k[r + 1]))
        keys, values = (x[at_k].float().repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q[at_q].float(), keys) * given["softmax_scale"]
        if given["causal"]:
            scores = scores.masked_fill(~torch.ones(num_q, num_k).tril(num_k - num_q).bool(), float("-inf"))
        out[at_q] = torch.einsum("hts,shd->thd", scores.softmax(-1), values).bfloat16()
        seen = scores.logsumexp(-1)
        lse[:, at_q] = seen.masked_fill(seen.isinf(), torch.nan)
        out[at_q][seen.T.isinf()] = torch.nan
    return (out, lse) if given["return_lse"] else out
