"""Attention over paged keys and values, and what writes them.

`npu_fused_infer_attention_score_v2` documents a query of one token and a longer one apart; so does this. Only what sglang-npu passes is taken:
layouts BSND and TND, keys in blocks [blocks, tokens, heads * dims] or with no pages (`ragged`), int8 with scales of tokens and heads under queries of one token.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sglang_npu_emulation.contract import HALVES, emulated, require, require_contiguous, require_dtype
from sglang_npu_emulation.ragged import BAND, EVER, NO_MASK, Band, attend, attend_rows, outside, require_band

PACKED, MOST_PACKED, MOST_TOKENS = 128, 4096, 2**20  # of layout TND: dims of a head, queries, and tokens in all
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
    pre_tokens: int = EVER,
    next_tokens: int = EVER,
    input_layout: str = "BSH",
    sparse_mode: int = NO_MASK,
    block_size: int = 0,
    return_softmax_lse: bool = False,
    dequant_scale_key: Tensor | None = None,
    dequant_scale_value: Tensor | None = None,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
    **others: object,
) -> tuple[Tensor, Tensor]:
    require(not others, f"{', '.join(others)}: not emulated")
    require((input_layout, query.dim()) in (("BSND", 4), ("TND", 3)), f"layout {input_layout} of {list(query.shape)}")
    require(actual_seq_kvlen is not None, "pages need actual_seq_kvlen")
    assert actual_seq_kvlen is not None
    require(query.numel() > 0, "query is empty")
    scales = (dequant_scale_key, dequant_scale_value)
    lens = list(actual_seq_kvlen)
    packed = input_layout == "TND"
    ends = _ends(query, packed, actual_seq_qlen, lens)
    *_, heads, dim = query.shape
    shared = num_key_value_heads or heads
    require(heads == num_query_heads and heads % shared == 0 and heads // shared <= 64, f"{heads} heads over {shared}")
    require(len(ends) <= 65536 and heads <= 256 and dim <= 512 and dim % 16 == 0, f"B {len(ends)}, N {heads}, D {dim}")
    require_dtype(HALVES, query=query)
    if block_table is None:
        require(
            query_rope is None and key_rope is None and scales == (None, None),
            "no pages: keys are numbers, in one part",
        )
        require(key_quant_mode == value_quant_mode == block_size == 0, "no pages: no modes of codes, no size of blocks")
        band = Band(mode=sparse_mode, mask=atten_mask, before=pre_tokens, after=next_tokens)
        out, sums = attend_rows(query, key, value, ends, lens, shared, band, softmax_scale)
        return _laid_out(query, out, sums, packed=packed, lse=return_softmax_lse)
    if key.dtype == torch.int8:
        require(query.shape[:-2].numel() == len(ends) and query_rope is None, "codes are for queries of one token")
        _require_scales(key, value, scales, (key_quant_mode, value_quant_mode), shared, dim)
    else:
        require(query.dtype == key.dtype == value.dtype, "query, key and value are of one dtype")
        require(scales == (None, None) and key_quant_mode == value_quant_mode == 0, "scales are of codes")
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
        block_table.dtype == torch.int32 and block_table.dim() == 2 and len(block_table) == len(ends),
        "int32[B, C] block_table",
    )
    require(len(lens) == len(ends) and min(lens) >= 0, "actual_seq_kvlen has a length, not negative, for each of B")
    columns = -(-max(lens) // block_size) if block_size else 0
    require(
        block_table.shape[1] >= columns, f"block_table has {block_table.shape[1]} columns, and {columns} are needed"
    )
    lengths = [end - start for start, end in pairwise([0, *ends])]
    if query_rope is not None:
        _require_latents(query, shared, query_rope, key_rope, block_size, lengths, sparse_mode, atten_mask)
    else:
        require(key_rope is None, "query_rope and key_rope go together")
        if packed:
            require(dim == PACKED and query.dtype == torch.bfloat16, f"TND: bfloat16 of {PACKED} dims, not {dim}")
        if packed or lengths[0] > 1:
            require_band(lengths, lens, Band(mode=sparse_mode, mask=atten_mask, before=pre_tokens, after=next_tokens))
            require(
                128 <= block_size <= 512 and block_size % 128 == 0,
                f"longer queries: blocks of 128, 256, 384, 512 tokens, not {block_size}",
            )
            require(packed or heads * dim < 65535, f"longer queries: N * D below 65535, not {heads * dim}")
        else:
            _require_one_token(len(ends), block_table.shape[1], block_size, atten_mask, lens)

    rows = query.reshape(-1, heads, dim)
    out, sums = torch.zeros_like(rows), torch.full((len(rows), heads), -torch.inf)
    for b, (start, end) in enumerate(pairwise([0, *ends])):
        n = lens[b]
        if n == 0:
            continue
        blocks = block_table[b, : -(-n // block_size)].long()
        q, k, v = rows[start:end], key[blocks].view(-1, shared, dim)[:n], value[blocks].view(-1, shared, dim)[:n]
        if query_rope is not None and key_rope is not None:
            q = torch.cat([q, query_rope.reshape(len(rows), heads, -1)[start:end]], dim=-1)
            k = torch.cat([k, key_rope[blocks].view(-1, 1, key_rope.shape[-1])[:n]], dim=-1)
        if key.dtype == torch.int8:
            k, v = (
                x * by_block[blocks].transpose(1, 2).reshape(-1, shared, 1)[:n]
                for x, by_block in zip((k, v), scales, strict=True)
                if by_block is not None
            )
            k, v = k.to(query.dtype), v.to(query.dtype)
        if sparse_mode == BAND:
            hidden = outside(end - start, n, pre_tokens, next_tokens)
        else:
            hidden = torch.zeros(1, n, dtype=torch.bool) if atten_mask is None else atten_mask[b, 0, :, :n].bool()
        out[start:end], sums[start:end] = attend(q.float(), k.float(), v.float(), hidden, softmax_scale)
    return _laid_out(query, out, sums, packed=packed, lse=return_softmax_lse)


def _laid_out(query: Tensor, out: Tensor, sums: Tensor, *, packed: bool, lse: bool) -> tuple[Tensor, Tensor]:
    """out: [T, N, Dv], sums: [T, N], as the layout of the query has them."""
    out = out.view(*query.shape[:-1], out.shape[-1])
    if not lse:
        return out, sums.new_empty(0)
    return out, sums[..., None] if packed else sums.view(*query.shape[:3], 1).transpose(1, 2)


def _ends(query: Tensor, packed: bool, qlens: list[int] | None, lens: list[int]) -> list[int]:
    """Where each query's rows end, in a row for all."""
    if not packed:
        batch, length = query.shape[:2]
        require(
            length == 1 or (qlens is not None and list(qlens) == [length] * batch),
            "actual_seq_qlen shorter than the query: not emulated",
        )
        return [length * (b + 1) for b in range(batch)]
    require(qlens is not None and len(qlens) == len(lens), "TND: an end for each query, and a number of its keys")
    assert qlens is not None
    ends = list(qlens)
    require(len(ends) <= MOST_PACKED and len(query) <= MOST_TOKENS, f"TND: {len(ends)} queries, {len(query)} tokens")
    require(
        all(a <= b for a, b in pairwise([0, *ends])) and ends[-1] == len(query), f"TND: ends {ends}, of {len(query)}"
    )
    return ends


def _require_scales(
    key: Tensor,
    value: Tensor,
    scales: tuple[Tensor | None, Tensor | None],
    modes: tuple[int, int],
    shared: int,
    dim: int,
) -> None:
    """Mode 5: by token and head, in blocks like the codes."""
    require(value.dtype == key.dtype and modes == (5, 5), f"int8: both of it, in modes 5, not {modes}")
    require(
        key.shape[1] % 32 == 0 and dim % 32 == 0, f"int8: blocks and dims of 32, 64, ..., not {key.shape[1]}, {dim}"
    )
    for scale in scales:
        require(scale is not None, "int8: scales of keys and values")
        assert scale is not None
        require_dtype((torch.float32,), scale=scale)
        wanted = (key.shape[0], shared, key.shape[1])
        require(scale.shape == wanted, f"scales [blocks, heads, tokens] {wanted}, not {list(scale.shape)}")
        require_contiguous(scale=scale)


def _require_one_token(batch: int, columns: int, block: int, mask: Tensor | None, lens: list[int]) -> None:
    require(
        0 < block <= 512 and block % 16 == 0, f"a query of one token: blocks of 16, 32, ... 512 tokens, not {block}"
    )
    require(max(lens) <= 262144, "a query of one token sees up to 262144 keys")
    if mask is None:
        return
    require_dtype((torch.bool, torch.int8, torch.uint8), atten_mask=mask)
    wanted = (batch, 1, 1, columns * block)
    require(mask.shape == wanted, f"a query of one token: a mask {list(wanted)}, of its blocks, not {list(mask.shape)}")


def _require_latents(
    query: Tensor,
    shared: int,
    query_rope: Tensor,
    key_rope: Tensor | None,
    block: int,
    lengths: list[int],
    mode: int,
    mask: Tensor | None,
) -> None:
    require(
        key_rope is not None and key_rope.dtype == query_rope.dtype == query.dtype, "both ropes, of the query's dtype"
    )
    assert key_rope is not None
    require(
        query.shape[-1] == 512 and query_rope.shape == (*query.shape[:-1], 64),
        "latents of 512 dims, rotated parts of 64",
    )
    require(
        query.shape[-2] in LATENT_HEADS and shared == 1,
        f"{LATENT_HEADS} heads over one, not {query.shape[-2]} over {shared}",
    )
    require(block in (16, 128), f"blocks of 16 or 128 tokens, not {block}")
    require(key_rope.dim() == 3 and key_rope.shape[1:] == (block, 64), f"key_rope {list(key_rope.shape)}")
    require(
        set(lengths) == {1} and mode == NO_MASK and mask is None, "queries of several tokens over latents: not emulated"
    )
