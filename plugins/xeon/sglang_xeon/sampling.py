"""sample.sample: greedy batches in one pass over the logits (csrc/rows.inl), draws without sorting them (csrc/sampling.inl)."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.api.ops import SampleParams
from sglang_xeon.library import ops

GREEDY_BELOW = 1e-5  # a temperature, as sglang_core.types has it

_argmax, _sample = ops.argmax.default, ops.sample.default


def sample(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> tuple[Tensor, Tensor | None]:
    """logits: [R, V] -> ids: int32[R], logprobs: float32[R, V] or None.

    Draws from the op's own numbers. A row whose number falls between two tokens by rounding may take either.
    """
    if params.all_greedy:
        ids = _argmax(logits)
    else:
        ids = _sample(
            logits,
            params.temperature,
            params.top_p,
            params.top_k,
            params.min_p,
            params.seeds,
            params.positions,
            GREEDY_BELOW,
            params.needs_filter,
        )
    return ids, torch.log_softmax(logits.float(), dim=-1) if logprobs else None
