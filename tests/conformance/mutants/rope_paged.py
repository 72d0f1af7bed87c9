"""attn.rope_paged with one mistake each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sglang_core.ops.rope_paged import HeadNorms
from tests.conformance.mutants.bodies import Mutant, body


def writes_keys_unturned(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor, rotary: Any, *at: Any, **kw: Any
) -> Any:
    norms = kw.pop("head_norms", None)
    if norms is not None:
        q, k = body("norm.rms", q, norms.q, norms.eps), body("norm.rms", k, norms.k, norms.eps)
    turned, _ = body("rope.apply", q, k, positions, table, rotary)
    return body("attn.paged", turned, k, v, *at, **kw)


def turns_by_place_in_the_batch(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *args: Any, **kw: Any) -> Any:
    place = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    return body("attn.rope_paged", q, k, v, place, *args, **kw)


def norms_keys_with_the_weight_of_queries(*args: Any, head_norms: HeadNorms | None = None, **kw: Any) -> Any:
    norms = head_norms and head_norms._replace(k=head_norms.q)
    return body("attn.rope_paged", *args, head_norms=norms, **kw)


def forgets_head_norms(*args: Any, head_norms: HeadNorms | None = None, **kw: Any) -> Any:
    return body("attn.rope_paged", *args, **kw)


def norms_after_turning(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor, rotary: Any, *at: Any, **kw: Any
) -> Any:
    norms = kw.pop("head_norms", None)
    q, k = body("rope.apply", q, k, positions, table, rotary)
    if norms is not None:
        q, k = body("norm.rms", q, norms.q, norms.eps), body("norm.rms", k, norms.k, norms.eps)
    return body("attn.paged", q, k, v, *at, **kw)


MUTANTS = {
    "writes_keys_unturned": Mutant("attn.rope_paged"),
    "turns_by_place_in_the_batch": Mutant("attn.rope_paged"),
    "norms_keys_with_the_weight_of_queries": Mutant("attn.rope_paged"),
    "forgets_head_norms": Mutant("attn.rope_paged"),
    "norms_after_turning": Mutant("attn.rope_paged"),
}
