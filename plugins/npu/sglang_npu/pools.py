"""Pools of NPUs. Attention reads a leaf as blocks, [blocks, tokens, heads * dims]; a page is a block, or several of them one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.api import DeviceError, Pool, PoolSpec

LATENTS, CODED = "npu.latents", "npu.int8"
RANK, ROPE_DIM = 512, 64  # what attention over latents is documented for
MOST_ELEMENTS = 2**31 - 1  # of one leaf: attention counts them in int32


class NpuPool(Pool):
    """The canonical layout, zeros at first: what attention makes of numbers past a req's end is not documented, and they may then not be NaN."""

    def __init__(self, spec: PoolSpec, num_pages: int, device: torch.device) -> None:
        refuse_large(spec, num_pages, max(spec.head_dim, spec.v_head_dim))
        super().__init__(spec, num_pages, device)
        for leaf in self.leaves:
            leaf.zero_()


class CodedPool(NpuPool):
    """int8 in the canonical layout; the scales of a block lie head by head, as attention reads them, and are shown token by token."""

    layout = CODED

    def __init__(self, spec: PoolSpec, num_pages: int, device: torch.device) -> None:
        super().__init__(spec, num_pages, device)
        for i, leaf in enumerate(self.leaves):
            if leaf.dtype == torch.float32:
                self.leaves[i] = leaf.transpose(1, 2).contiguous().transpose(1, 2)


class LatentPool(Pool):
    """Latents [N, P, 1, 512] and rotated keys [N, P, 1, 64]: narrower ones are followed by zeros, which add nothing to a score."""

    layout = LATENTS

    def __init__(self, spec: PoolSpec, num_pages: int, device: torch.device) -> None:
        refuse_large(spec, num_pages, RANK)
        super().__init__(spec, 0, device)
        self.num_pages = num_pages
        self.leaves = [
            torch.zeros(num_pages, spec.page_size, 1, dim, dtype=spec.dtype, device=device)
            for _ in range(spec.num_layers)
            for dim in (RANK, ROPE_DIM)
        ]

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        c_kv, k_pe = super().gather(layer, slots)
        return c_kv[..., : self.spec.head_dim], k_pe[..., : self.spec.v_head_dim]

    def gather_heads(self, layer: int, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        c_kv, k_pe = super().gather_heads(layer, slots, dtype)
        return c_kv[..., : self.spec.head_dim], k_pe[..., : self.spec.v_head_dim]

    def scatter(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        super().scatter(layer, slots, widened(k, RANK), widened(v, ROPE_DIM))


def widened(x: Tensor, dim: int) -> Tensor:
    """x: [..., D] -> [..., dim], zeros after what is there."""
    return x if x.shape[-1] == dim else torch.nn.functional.pad(x, (0, dim - x.shape[-1]))


def refuse_large(spec: PoolSpec, num_pages: int, dim: int) -> None:
    """Raises DeviceError where attention could not count the elements of a leaf."""
    per_token = spec.num_kv_heads * dim
    if num_pages * spec.page_size * per_token > MOST_ELEMENTS:
        raise DeviceError(
            f"{num_pages * spec.page_size} tokens of {per_token} elements a layer are more than attention on NPUs counts in int32;"
            f" take --max-total-tokens {MOST_ELEMENTS // per_token // spec.page_size * spec.page_size} or fewer"
        )
