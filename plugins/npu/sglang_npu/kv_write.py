"""kv.write and kv.write_mla by npu_scatter_pa_kv_cache; kv.write of codes by PyTorch's operators."""

from __future__ import annotations

import torch_npu
from torch import Tensor

from sglang_core.api import Pool
from sglang_npu.pools import CODED, RANK, ROPE_DIM, widened


def kv_write(k: Tensor, v: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """k: [T, Hk, D], v: [T, Hk, Dv] in the pool's dtype, or to be made codes, slot_mapping: int32[T].

    The vendor leaves open what a slot gets that several rows name. Padding alone does that, in page 0, which nobody reads.
    """
    if pool.layout == CODED:  # whose scales the vendor's op does not take along
        pool.scatter(layer, slot_mapping, k, v)
    elif k.numel():
        torch_npu.npu_scatter_pa_kv_cache(
            k.contiguous(), v.contiguous(), pool.k(layer), pool.v(layer), slot_mapping, cache_mode="Norm"
        )


def kv_write_mla(c_kv: Tensor, k_pe: Tensor, pool: Pool, layer: int, slot_mapping: Tensor) -> None:
    """c_kv: [T, rank], k_pe: [T, rope_dim], in the pool's dtype, slot_mapping: int32[T]."""
    kv_write(widened(c_kv[:, None], RANK), widened(k_pe[:, None], ROPE_DIM), pool, layer, slot_mapping)
