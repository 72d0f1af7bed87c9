"""What happens to logits between the head and the sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.ops.registry import op
from sglang_core.ops.rounding import wide

BITS = 32  # tokens a bitmask word holds
NEG_INF = float("-inf")


@op("logits.soft_cap")
def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """logits: [R, V] of any float dtype -> cap * tanh(logits / cap): float32[R, V], never rounded."""
    return torch.tanh(wide(logits) / cap) * cap


@op("logits.mask")
def mask(logits: Tensor, bitmask: Tensor) -> Tensor:
    """logits: [R, V], bitmask: int32[R, ceil(V / 32)] -> logits in their dtype, -inf where a token's bit is 0.

    Token i is bit i % 32 of word i // 32. A row of -1 allows every token.
    """
    token = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    allowed = (bitmask[:, token // BITS] >> (token % BITS)) & 1
    return torch.where(allowed == 1, logits, NEG_INF)


@op("logits.adjust")
def adjust(logits: Tensor, rows: Tensor, ids: Tensor, repetition: Tensor, add: Tensor) -> Tensor:
    """logits: [R, V]; E entries rows, ids: int32[E], repetition, add: float32[E] -> float32[R, V], a new tensor.

    Entry e changes logits[rows[e], ids[e]]: a positive one is divided by repetition[e], any other multiplied; then add[e] is
    added (-inf forbids the token). An entry names a (row, id) that no other does. Padding has repetition 1 and add 0, and may
    name any (row, id).
    """
    out = wide(logits)
    old = out[rows, ids]
    new = torch.where(old > 0, old / repetition, old * repetition) + add
    change = torch.where(new == old, 0.0, new - old)  # -inf stays -inf and does not become NaN
    # Adding the change, rather than setting the value, lets padding name an entry that is in use.
    return out.index_put((rows, ids), change.to(out.dtype), accumulate=True)
