"""Attention over paged keys and values, and what writes them.

`npu_fused_infer_attention_score_v2` documents a query of one token and a longer one apart; so does this. Only what sglang-npu passes is taken:
layout BSND, pages in blocks [blocks, tokens, heads * dims], no quantisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_npu_emulation.contract import HALVES, emulated, require, require_contiguous, require_dtype

MASK = 2048
NO_MASK, CAUSAL = 0, 3  # sparse_mode
ELEMENTS = 2**31 - 1
LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)


@emulated("npu_scatter_pa_kv_cache")
def scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Scenario 2: keys [T, H, D] into blocks [N, P, H, D]."""
    require(cache_mode in (None, "Norm"), f"caches here are ND, and cache_mode is {cache_mode}; its default is PA_NZ")
    require(compress_lens is None and compress_seq_offsets is None and seq_lens is None, "compression is not emulated")
    require_contiguous(key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=slot_mapping)
    dtypes = {x.dtype for x in (key, value, key_cache, value_cache)}
    require(len(dtypes) == 1, f"keys, values and their caches are of one dtype, not {dtypes}")
    require_dtype((torch.int32, torch.int64), slot_mapping=slot_mapping)
    require(
        key.dim() == value.dim() == 3 and key.shape[:2] == value.shape[:2],
        "key and value are [T, H, D], of one T and H",
    )
    require(slot_mapping.shape == key.shape[:1], "slot_mapping has a slot for each token")
    require(key.numel() > 0, "key is empty")
    size = key_cache.shape[1]
    for new, cache in ((key, key_cache), (value, value_cache)):
        require(
            cache.dim() == 4 and cache.shape[2:] == new.shape[1:], f"{list(cache.shape)} holds no {list(new.shape)}"
        )
    require(
        bool((slot_mapping >= 0).all() and (slot_mapping < key_cache.shape[0] * size).all()), "slots are of the cache"
    )
    kept = slot_mapping[slot_mapping >= size]  # page 0 is scratch: what lands there may be anything
    require(kept.unique().numel() == kept.numel(), "a slot is named twice")
    at = (slot_mapping // size, slot_mapping % size)
    key_cache.index_put_(at, key)
    value_cache.index_put_(at, value)


@emulated("npu_fused_infer_attention_score_v2")
def fused_infer_attention_score_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    block_table: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    input_layout: str = "BSH",
    sparse_mode: int = NO_MASK,
    block_size: int = 0,
    return_softmax_lse: bool = False,
    **others: object,
) -> tuple[Tensor, Tensor]:
    require(not others, f"{', '.join(others)}: not emulated")
    require(input_layout == "BSND" and query.dim() == 4, f"layout {input_layout} is not emulated")
    require(block_table is not None and actual_seq_kvlen is not None, "pages need a block_table and actual_seq_kvlen")
    assert block_table is not None and actual_seq_kvlen is not None
    batch, length, heads, dim = query.shape
    shared = num_key_value_heads or heads
    require(query.numel() > 0, "query is empty")
    require(heads == num_query_heads and heads % shared == 0 and heads // shared <= 64, f"{heads} heads over {shared}")
    require(batch <= 65536 and heads <= 256 and dim <= 512 and dim % 16 == 0, f"B {batch}, N {heads}, D {dim}")
    require_dtype(HALVES, query=query)
    require(query.dtype == key.dtype == value.dtype, "query, key and value are of one dtype")
    require(
        key.shape == value.shape and key.dim() == 3, f"blocks are [blocks, tokens, heads * dims], not {list(key.shape)}"
    )
    require(
        key.shape[1:] == (block_size, shared * dim), f"blocks {list(key.shape)} of {block_size} tokens, {shared} heads"
    )
    require(shared * dim <= 65535 and key.numel() <= ELEMENTS, "KV_N * D up to 65535, and a cache's elements fit int32")
    require_contiguous(
        query=query, key=key, value=value, atten_mask=atten_mask, query_rope=query_rope, key_rope=key_rope
    )
    require(
        block_table.dtype == torch.int32 and block_table.dim() == 2 and len(block_table) == batch,
        "int32[B, C] block_table",
    )
    lens = list(actual_seq_kvlen)
    require(len(lens) == batch and min(lens) >= 0, "actual_seq_kvlen has a length, not negative, for each of B")
    columns = -(-max(lens) // block_size) if block_size else 0
    require(
        block_table.shape[1] >= columns, f"block_table has {block_table.shape[1]} columns, and {columns} are needed"
    )
    if query_rope is None:
        require(key_rope is None, "query_rope and key_rope go together")
        _require_pages(length, heads * dim, block_size, sparse_mode, atten_mask, actual_seq_qlen, lens)
    else:
        _require_latents(query, shared, query_rope, key_rope, block_size, length, sparse_mode, atten_mask)
    return _attend(
        query, query_rope, key, key_rope, value, block_table, lens, shared, softmax_scale, return_softmax_lse
    )


def _require_pages(
    length: int, width: int, block: int, mode: int, mask: Tensor | None, qlens: list[int] | None, lens: list[int]
) -> None:
    if length == 1:
        require(
            0 < block <= 512 and block % 16 == 0, f"a query of one token: blocks of 16, 32, ... 512 tokens, not {block}"
        )
        require(max(lens) <= 262144, "a query of one token sees up to 262144 keys")
        require(mode == NO_MASK and mask is None, "a query of one token needs no mask")
        return
    require(
        128 <= block <= 512 and block % 128 == 0, f"longer queries: blocks of 128, 256, 384, 512 tokens, not {block}"
    )
    require(width < 65535, f"longer queries: N * D below 65535, not {width}")
    require(mode == CAUSAL, f"sparse_mode {mode} is not emulated for longer queries")
    shape = None if mask is None else list(mask.shape)
    require(mask is not None and shape == [MASK, MASK], f"sparse_mode 3 wants a mask of {MASK} x {MASK}, not {shape}")
    assert mask is not None
    require(mask.dtype in (torch.bool, torch.int8, torch.uint8), f"a mask of {mask.dtype}")
    require(torch.equal(mask.bool(), torch.ones_like(mask, dtype=torch.bool).triu(1)), "the mask is the upper triangle")
    require(
        qlens is not None and list(qlens) == [length] * len(lens),
        "actual_seq_qlen shorter than the query: not emulated",
    )
    require(all(length <= n for n in lens), "a query is no longer than its keys")


def _require_latents(
    query: Tensor,
    shared: int,
    query_rope: Tensor,
    key_rope: Tensor | None,
    block: int,
    length: int,
    mode: int,
    mask: Tensor | None,
) -> None:
    require(
        key_rope is not None and key_rope.dtype == query_rope.dtype == query.dtype, "both ropes, of the query's dtype"
    )
    assert key_rope is not None
    require(
        query.shape[3] == 512 and query_rope.shape == (*query.shape[:3], 64), "latents of 512 dims, rotated parts of 64"
    )
    require(
        query.shape[2] in LATENT_HEADS and shared == 1,
        f"{LATENT_HEADS} heads over one, not {query.shape[2]} over {shared}",
    )
    require(block in (16, 128), f"blocks of 16 or 128 tokens, not {block}")
    require(key_rope.dim() == 3 and key_rope.shape[1:] == (block, 64), f"key_rope {list(key_rope.shape)}")
    require(length == 1 and mode == NO_MASK and mask is None, "queries of several tokens over latents: not emulated")


def _attend(
    query: Tensor,
    query_rope: Tensor | None,
    key: Tensor,
    key_rope: Tensor | None,
    value: Tensor,
    table: Tensor,
    lens: list[int],
    shared: int,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Softmax in float32, in one piece. Queries are a req's last tokens. Keys past a req's end are not looked at."""
    batch, length, heads, dim = query.shape
    out = torch.zeros_like(query)
    sums = torch.full((batch, heads, length, 1), -torch.inf)
    for b, n in enumerate(lens):
        if n == 0:
            continue
        blocks = table[b, : -(-n // key.shape[1])].long()
        k = key[blocks].view(-1, shared, dim)[:n].float()
        v = value[blocks].view(-1, shared, dim)[:n].float()
        q = query[b].float()
        if query_rope is not None and key_rope is not None:
            q = torch.cat([q, query_rope[b].float()], dim=-1)
            k = torch.cat([k, key_rope[blocks].view(-1, 1, key_rope.shape[-1])[:n].float()], dim=-1)
        q = q.transpose(0, 1).reshape(shared, -1, q.shape[-1])  # heads that share keys lie side by side
        scores = (q @ k.permute(1, 2, 0) * scale).view(heads, length, n)
        if length > 1:
            later = torch.ones(length, n, dtype=torch.bool).triu(n - length + 1)
            scores = scores.masked_fill(later, -torch.inf)
        sums[b] = scores.logsumexp(-1, keepdim=True)
        weights = scores.softmax(-1).view(shared, -1, n)
        out[b] = (weights @ v.transpose(0, 1)).view(heads, length, dim).transpose(0, 1).to(query.dtype)
    return out, sums if return_lse else sums.new_empty(0)
