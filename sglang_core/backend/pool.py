"""`Pool`: one rank's K/V store of one kind, full KV or MLA latents. The runtime owns the bytes; the core owns the page ids.

Page 0 is scratch: padding writes there. A slot is `page * page_size + offset`. Stale slots may hold NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSpec:
    """What one pool holds, for this rank.

    Kind "mla": a token keeps one latent and one rotated key that all heads share. They stand where K and V stand in a full
    pool: num_kv_heads is 1, head_dim the latent's rank, v_head_dim that of the rotated key.
    """

    kind: Literal["full", "mla"] = "full"
    group: str = "full"
    num_layers: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    layout: str = "canonical"  # as kernel selection chose it; a runtime that cannot make it raises

    def __post_init__(self) -> None:
        assert self.kind == "full" or self.num_kv_heads == 1, "latents have no heads"

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.num_kv_heads * (self.head_dim + self.v_head_dim) * self.dtype.itemsize

    @property
    def bytes_per_page(self) -> int:
        return self.bytes_per_token * self.page_size


class Pool:
    """Canonical layout: per layer one leaf k: [N, P, Hk, D] and one leaf v: [N, P, Hk, Dv].

    Of kind "mla" they are c_kv: [N, P, 1, rank] and k_pe: [N, P, 1, rope dims]; all methods take and give the two in this
    order. Two leaves and not one of rank + rope dims: values are c_kv alone, read whole and unstrided, and the two may be
    rounded differently. A kernel that wants them fused says so with a layout of its own.

    The runtime may rebind `leaves` (a functional compiler donates them); nobody holds one across a step. Writes go to the
    leaf itself, never through a view.
    """

    layout = "canonical"

    def __init__(self, spec: PoolSpec, num_pages: int, device: torch.device) -> None:
        self.spec, self.num_pages = spec, num_pages
        p, h = spec.page_size, spec.num_kv_heads
        self.leaves: list[Tensor] = []
        for _ in range(spec.num_layers):
            self.leaves.append(torch.empty(num_pages, p, h, spec.head_dim, dtype=spec.dtype, device=device))
            self.leaves.append(torch.empty(num_pages, p, h, spec.v_head_dim, dtype=spec.dtype, device=device))

    def k(self, layer: int) -> Tensor:
        return self.leaves[2 * layer]

    def v(self, layer: int) -> Tensor:
        return self.leaves[2 * layer + 1]

    def c_kv(self, layer: int) -> Tensor:
        assert self.spec.kind == "mla", "a pool of keys and values holds no latents"
        return self.leaves[2 * layer]

    def k_pe(self, layer: int) -> Tensor:
        assert self.spec.kind == "mla", "a pool of keys and values holds no latents"
        return self.leaves[2 * layer + 1]

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots: int32[T] -> k: [T, Hk, D], v: [T, Hk, Dv], copies in the canonical layout."""
        page, offset = slots // self.spec.page_size, slots % self.spec.page_size
        return self.k(layer)[page, offset], self.v(layer)[page, offset]

    def scatter(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """slots: int32[T], k: [T, Hk, D], v: [T, Hk, Dv]. Later rows win where slots repeat (only scratch may)."""
        page, offset = slots // self.spec.page_size, slots % self.spec.page_size
        self.k(layer).index_put_((page, offset), k.to(self.spec.dtype))
        self.v(layer).index_put_((page, offset), v.to(self.spec.dtype))

    def move(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Copy slots within the pool in every layer; all reads happen before any write."""
        for layer in range(self.spec.num_layers):
            self.scatter(layer, dst_slots, *self.gather(layer, src_slots))

    def export_pages(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """pages: int32[n] -> k: [n, P, Hk, D], v: [n, P, Hk, Dv] in host memory."""
        return self.k(layer)[pages].cpu(), self.v(layer)[pages].cpu()

    def import_pages(self, layer: int, pages: Tensor, k: Tensor, v: Tensor) -> None:
        """The inverse of `export_pages`."""
        self.k(layer).index_put_((pages,), k.to(self.k(layer).device))
        self.v(layer).index_put_((pages,), v.to(self.v(layer).device))

    def poison(self, pages: Iterable[int]) -> None:
        """Fill pages with NaN: whatever reads a slot that nobody wrote then shows. A testing aid."""
        index = torch.tensor(list(pages), dtype=torch.int32, device=self.leaves[0].device)
        for leaf in self.leaves:
            leaf.index_fill_(0, index.long(), float("nan"))

    def regions(self) -> list[tuple[int, int]]:
        """(address, bytes) of each leaf, for transports; pools of equal `fingerprint` may exchange them raw."""
        return [(leaf.data_ptr(), leaf.numel() * leaf.element_size()) for leaf in self.leaves]

    @property
    def fingerprint(self) -> str:
        s = self.spec
        return f"{self.layout}/{s.kind}/{s.group}/L{s.num_layers}/P{s.page_size}/H{s.num_kv_heads}/D{s.head_dim}.{s.v_head_dim}/{s.dtype}"
