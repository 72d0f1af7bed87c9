"""sample.sample: greedy batches through one pass over the logits (csrc/rows.inl), all others through the op's body."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.api.ops import OPS, SampleParams
from sglang_xeon.library import ops

_argmax = ops.argmax.default
_body = OPS["sample.sample"].body


def sample(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> tuple[Tensor, Tensor | None]:
    """logits: [R, V] -> ids: int32[R], logprobs: float32[R, V] or None."""
    if not params.all_greedy:
        return _body(logits, params, logprobs=logprobs)  # type: ignore[no-any-return]
    return _argmax(logits), torch.log_softmax(logits.float(), dim=-1) if logprobs else None
