"""Attention over keys and values without pages, and over bands: the parts of `npu_fused_infer_attention_score_v2` that layouts TND and BSND share."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sglang_npu_emulation.contract import require, require_contiguous, require_dtype

MASK = 2048
NO_MASK, BAND = 0, 4  # sparse_mode
EVER = 2**31 - 1
PACKED_DIMS = ((128, 128), (192, 128), (192, 192))  # of heads of keys and of values, in layout TND


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """What a call says of which keys are seen."""

    mode: int  # sparse_mode
    mask: Tensor | None
    before: int  # pre_tokens
    after: int  # next_tokens


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, ends: list[int], lens: list[int], shared: int, band: Band, scale: float
) -> tuple[Tensor, Tensor]:
    """Layout TND: query [T, N, D] whose reqs end at `ends`, key [S, shared, D] at `lens`; or BSND of one req. -> [T, N, Dv], [T, N]."""
    packed = query.dim() == 3
    require(packed or len(query) == 1, "BSND without pages: of one req alone, here")
    require(
        key.dim() == value.dim() == query.dim() and key.shape[:-1] == value.shape[:-1], "keys and values of one shape"
    )
    require(key.dtype == value.dtype == query.dtype, "query, key and value are of one dtype")
    require_contiguous(query=query, key=key, value=value, atten_mask=band.mask)
    if not packed:
        query, key, value = query[0], key[0], value[0]
    (num, heads, dim), value_dim = query.shape, value.shape[-1]
    require(num > 0 and key.numel() > 0, "neither queries nor keys are empty")
    require(key.shape[1:] == (shared, dim), f"keys [S, {shared}, {dim}], not {list(key.shape)}")
    if packed:
        require(query.dtype == torch.bfloat16, f"TND: bfloat16, not {query.dtype}")
        require((dim, value_dim) in PACKED_DIMS, f"TND: heads of {PACKED_DIMS} dims, not {dim} and {value_dim}")
    else:
        require(dim == value_dim, f"BSND: keys and values of the same dims, not {dim} and {value_dim}")
        require(num == 1 or heads * dim < 65535, f"BSND: N * D below 65535, not {heads * dim}")
    require(all(a <= b for a, b in pairwise([0, *lens])) and lens[-1] == len(key), f"keys end at {lens}, of {len(key)}")
    lengths, num_keys = ([b - a for a, b in pairwise([0, *places])] for places in (ends, lens))
    require(all(n > 0 for length, n in zip(lengths, num_keys, strict=True) if length), "a req with queries and no keys")
    if num == 1 and not packed:
        require(
            band.mode == NO_MASK and band.mask is None, "a query of one token has no band, and its mask is not emulated"
        )
    elif band.mode == NO_MASK:
        require(band.mask is None, "sparse_mode 0 with a mask: not emulated, and in TND not documented")
    else:
        require_band(lengths, num_keys, band)
    out, sums = query.new_empty(num, heads, value_dim), torch.empty(num, heads)
    for (start, end), (first, last) in zip(pairwise([0, *ends]), pairwise([0, *lens]), strict=True):
        hidden = torch.zeros(1, last - first, dtype=torch.bool)
        if band.mode == BAND:
            hidden = outside(end - start, last - first, band.before, band.after)
        q, k, v = (x.float() for x in (query[start:end], key[first:last], value[first:last]))
        out[start:end], sums[start:end] = attend(q, k, v, hidden, scale)
    return out, sums


def require_band(lengths: list[int], lens: list[int], band: Band) -> None:
    """lengths: of the queries, lens: how many keys each has."""
    mask, before, after = band.mask, band.before, band.after
    require(band.mode == BAND, f"sparse_mode {band.mode} is not emulated for longer queries")
    shape = None if mask is None else list(mask.shape)
    require(mask is not None and shape == [MASK, MASK], f"sparse_mode 4 wants a mask of {MASK} x {MASK}, not {shape}")
    assert mask is not None
    require_dtype((torch.bool, torch.int8, torch.uint8), atten_mask=mask)
    require(torch.equal(mask.bool(), torch.ones_like(mask, dtype=torch.bool).triu(1)), "the mask is the upper triangle")
    require(all(length <= n for length, n in zip(lengths, lens, strict=True)), "a query is no longer than its keys")
    require(before + after >= 0, f"a band from {before} keys before to {after} after is empty")
    require(
        all(before >= -length and after >= -n for length, n in zip(lengths, lens, strict=True)),
        f"a band of {before} keys before and {after} after leaves its query",
    )


def outside(length: int, n: int, before: int, after: int) -> Tensor:
    """bool[length, n]: what a band leaves out. The last query's own key is the last one."""
    place = torch.arange(n - length, n)[:, None]
    key = torch.arange(n)
    return (key < place - before) | (key > place + after)


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q: [S, N, D], k: [n, shared, D], v: [n, shared, Dv], hidden: [S or 1, n] -> [S, N, Dv], [S, N]. In one piece. A hidden key's value is
    multiplied by 0, as a device may do that reads whole blocks: it had better be a number."""
    length, heads, _ = q.shape
    shared = k.shape[1]
    q = q.view(length, shared, heads // shared, -1)
    scores = torch.einsum("shgd,nhd->shgn", q, k) * scale
    scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    o = torch.einsum("shgn,nhd->shgd", scores.softmax(-1), v)
    return o.flatten(1, 2), scores.logsumexp(-1).flatten(1)
