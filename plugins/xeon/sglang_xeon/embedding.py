"""embed.lookup (csrc/rows.inl)."""

from __future__ import annotations

from torch import Tensor

from sglang_xeon.library import ops

_embed = ops.embed.default


def embed_lookup(ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    """ids: int32[T], weight: [V, M] -> [T, M]; zeros for ids outside."""
    return _embed(ids, weight, vocab_start)  # type: ignore[no-any-return]
