"""`Pool`: one rank's K/V store of one kind, full KV or MLA latents. The runtime owns the bytes; the core owns the page ids.

Page 0 is scratch: padding writes there. A slot is `page * page_size + offset`. Stale slots may hold NaN.
What a pool of fp8 or int8 stores is defined in `kv_dtypes`; `gather` and `scatter` give and take numbers, all else moves bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sglang_core.backend.kv_dtypes import Scaling, encode_fp8, encode_int8, heads_first, scaling_of
from sglang_core.types import GroupSpec

SCALE_DTYPE = torch.float32


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
    window: int | None = None  # no layer reads a token that is not among the last so many: the core frees its page
    encoder_len: int | None = None  # holds encoder outputs for cross attention, of at most so many tokens each

    def __post_init__(self) -> None:
        assert self.kind == "full" or self.num_kv_heads == 1, "latents have no heads"

    @property
    def group_spec(self) -> GroupSpec:
        """What scheduler and prefix tree must know of it."""
        if self.encoder_len is not None:
            return GroupSpec(name=self.group, kind="cross")
        return GroupSpec(name=self.group, kind="full" if self.window is None else "windowed", window=self.window)

    @property
    def scaling(self) -> Scaling:
        """Which scales go with the stored codes: none, one a layer and head, or one a token, layer and head."""
        return scaling_of(self.dtype)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, dynamic scales included."""
        codes = (self.head_dim + self.v_head_dim) * self.dtype.itemsize
        scales = 2 * SCALE_DTYPE.itemsize if self.scaling == "dynamic" else 0
        return self.num_layers * self.num_kv_heads * (codes + scales)

    @property
    def bytes_per_page(self) -> int:
        return self.bytes_per_token * self.page_size


class Pool:
    """Canonical layout: per layer one leaf k: [N, P, Hk, D] and one leaf v: [N, P, Hk, Dv].

    Of kind "mla" they are c_kv: [N, P, 1, rank] and k_pe: [N, P, 1, rope dims]; all methods take and give the two in this
    order. Two leaves and not one of rank + rope dims: values are c_kv alone, read whole and unstrided, and the two may be
    rounded differently. A kernel that wants them fused says so with a layout of its own.

    Dynamic scales are two more leaves a layer, after its k and v: float32[N, P, Hk, 1] each. Static ones are `scales`, one
    float32[Hk] for each k and v leaf: `set_scales` gives them once, when the model is loaded, and no step changes them.

    The runtime may rebind `leaves` (a functional compiler donates them); nobody holds one across a step. Writes go to the
    leaf itself, never through a view.
    """

    layout = "canonical"

    def __init__(self, spec: PoolSpec, num_pages: int, device: torch.device) -> None:
        self.spec, self.num_pages = spec, num_pages
        p, h = spec.page_size, spec.num_kv_heads
        self.leaves: list[Tensor] = []
        self.scales: list[Tensor] = []
        for _ in range(spec.num_layers):
            for dim in (spec.head_dim, spec.v_head_dim):
                self.leaves.append(torch.empty(num_pages, p, h, dim, dtype=spec.dtype, device=device))
                if spec.scaling == "static":
                    self.scales.append(torch.ones(h, dtype=SCALE_DTYPE, device=device))
            if spec.scaling == "dynamic":
                self.leaves += [torch.empty(num_pages, p, h, 1, dtype=SCALE_DTYPE, device=device) for _ in range(2)]

    def layer_leaves(self, layer: int) -> list[Tensor]:
        """What of `leaves` is of this layer: k, v, and their dynamic scales if any."""
        count = len(self.leaves) // self.spec.num_layers
        return self.leaves[layer * count : (layer + 1) * count]

    def k(self, layer: int) -> Tensor:
        return self.layer_leaves(layer)[0]

    def v(self, layer: int) -> Tensor:
        return self.layer_leaves(layer)[1]

    def k_scale(self, layer: int) -> Tensor:
        """float32[Hk] where scales are static, float32[N, P, Hk, 1] where they are dynamic."""
        return self._scale(layer, 0)

    def v_scale(self, layer: int) -> Tensor:
        """As `k_scale`."""
        return self._scale(layer, 1)

    def _scale(self, layer: int, which: int) -> Tensor:
        assert self.spec.scaling != "none", f"a pool of {self.spec.dtype} has no scales"
        return self.scales[2 * layer + which] if self.scales else self.layer_leaves(layer)[2 + which]

    def set_scales(self, layer: int, k: Tensor, v: Tensor) -> None:
        """The layer's static scales. k, v: float32[Hk], or [1] for all heads."""
        assert self.spec.scaling == "static", f"a pool of {self.spec.dtype} has no static scales"
        for which, scale in enumerate((k, v)):
            self.scales[2 * layer + which].copy_(scale.expand(self.spec.num_kv_heads))

    def c_kv(self, layer: int) -> Tensor:
        assert self.spec.kind == "mla", "a pool of keys and values holds no latents"
        return self.k(layer)

    def k_pe(self, layer: int) -> Tensor:
        assert self.spec.kind == "mla", "a pool of keys and values holds no latents"
        return self.v(layer)

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots: int32[T] -> k: [T, Hk, D], v: [T, Hk, Dv], copies in the canonical layout; float32 where codes are scaled."""
        at = (slots // self.spec.page_size, slots % self.spec.page_size)
        dtype = self.spec.dtype if self.spec.scaling == "none" else SCALE_DTYPE
        k, v = self._read(layer, lambda leaf: leaf[at], lambda scale: scale[:, None], dtype)
        return k, v

    def gather_heads(self, layer: int, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """slots: int32[B, S] -> k: [B, Hk, S, D], v: [B, Hk, S, Dv] in `dtype`, in which codes are scaled."""
        k, v = self._read(layer, lambda leaf: heads_first(leaf, slots), lambda scale: scale[:, None, None], dtype)
        return k, v

    def _read(
        self, layer: int, pick: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> list[Tensor]:
        """k and v as numbers. `pick` takes rows of a leaf; `spread` lets a static scale's [Hk] broadcast to them."""
        k, v, *dynamic = (pick(leaf).to(dtype) for leaf in self.layer_leaves(layer))
        if self.spec.scaling == "none":
            return [k, v]
        scales = dynamic or [spread(scale).to(dtype) for scale in (self.k_scale(layer), self.v_scale(layer))]
        return [k * scales[0], v * scales[1]]

    def scatter(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """slots: int32[T], k: [T, Hk, D], v: [T, Hk, Dv]. Later rows win where slots repeat (only scratch may)."""
        at = (slots // self.spec.page_size, slots % self.spec.page_size)
        rows: tuple[Tensor, ...]
        match self.spec.scaling:
            case "static":
                rows = encode_fp8(k, self.k_scale(layer)), encode_fp8(v, self.v_scale(layer))
            case "dynamic":
                (k_code, k_scale), (v_code, v_scale) = encode_int8(k), encode_int8(v)
                rows = k_code, v_code, k_scale, v_scale
            case "none":
                rows = k.to(self.spec.dtype), v.to(self.spec.dtype)
        for leaf, row in zip(self.layer_leaves(layer), rows, strict=True):
            leaf.index_put_(at, row)

    def move(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Copy slots within the pool in every layer, as stored; all reads happen before any write."""
        size = self.spec.page_size
        src, dst = ((slots // size, slots % size) for slots in (src_slots, dst_slots))
        for leaf in self.leaves:
            leaf.index_put_(dst, leaf[src])

    def export_pages(self, layer: int, pages: Tensor) -> tuple[Tensor, ...]:
        """pages: int32[n] -> the layer's leaves at these pages, as stored, in host memory: k: [n, P, Hk, D], v, and so on."""
        return tuple(leaf[pages].cpu() for leaf in self.layer_leaves(layer))

    def import_pages(self, layer: int, pages: Tensor, *stored: Tensor) -> None:
        """The inverse of `export_pages`."""
        for leaf, part in zip(self.layer_leaves(layer), stored, strict=True):
            leaf.index_put_((pages,), part.to(leaf.device))

    def poison(self, pages: Iterable[int]) -> None:
        """Fill pages with NaN: whatever reads a slot that nobody wrote then shows. A testing aid.

        int8 codes cannot be NaN, and stay: their scales become it.
        """
        index = torch.tensor(list(pages), dtype=torch.int32, device=self.leaves[0].device)
        for leaf in self.leaves:
            if leaf.dtype != torch.int8:
                leaf.index_put_((index,), leaf.new_full((), float("nan")))

    def regions(self) -> list[tuple[int, int]]:
        """(address, bytes) of each leaf, for transports; pools of equal `fingerprint` may exchange them raw."""
        return [(leaf.data_ptr(), leaf.numel() * leaf.element_size()) for leaf in self.leaves]

    @property
    def fingerprint(self) -> str:
        """What two pools must agree on to exchange bytes; that of a pool with static scales knows their values."""
        s = self.spec
        stored = f"{s.dtype}"
        if s.scaling == "static":
            stored += f"*{zlib.crc32(torch.stack(self.scales).cpu().numpy().tobytes()):08x}"
        return f"{self.layout}/{s.kind}/{s.group}/L{s.num_layers}/P{s.page_size}/H{s.num_kv_heads}/D{s.head_dim}.{s.v_head_dim}/{stored}"
