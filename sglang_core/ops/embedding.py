"""Embedding lookup, whole or one rank's rows of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_core.ops.registry import op


@op("embed.lookup")
def embed_lookup(ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    """ids: int32[T], weight: [V, M], rows [vocab_start, vocab_start + V) of the table -> [T, M].

    Ids outside the range give rows of zeros, so that a sum over ranks is the whole lookup.
    """
    local = ids - vocab_start
    inside = (local >= 0) & (local < weight.shape[0])
    rows = F.embedding(torch.where(inside, local, 0), weight)
    return torch.where(inside[:, None], rows, 0)
