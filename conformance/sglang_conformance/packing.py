"""What a kernel that packs weights for itself is held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sglang_core.ops.weight import PackedWeight

MINUS_ZERO = 0x80  # of e4m3fn
Pack = Callable[..., Any]


def check_packing(w: PackedWeight, pack: Pack, unpack: Pack | None) -> None:
    """unpack(pack(w)) is w bit for bit, and pack(other, out=...) rewrites what is packed where it lies.

    Codes of fp8 may differ in the sign of a zero: there are devices whose fp8 has no -0.

    Raises AssertionError with what is wrong.
    """
    assert unpack is not None, "the kernel packs weights, and gives no unpack"
    packed = pack(w)
    assert packed.layout != "canonical", "packed weights must name a layout of their own"
    _assert_same(unpack(packed), w, "unpack(pack(w)) is not w")
    flipped = {name: tensor.flip(0).contiguous() for name, tensor in w.named_buffers()}
    other = PackedWeight(
        w.fmt, flipped, out_features=w.out_features, in_features=w.in_features, num_experts=w.num_experts
    )
    places = {name: tensor.data_ptr() for name, tensor in packed.named_buffers()}
    again = pack(other, out=packed)
    assert {name: tensor.data_ptr() for name, tensor in again.named_buffers()} == places, "pack(w, out=...) moved it"
    _assert_same(unpack(packed), other, "pack(w, out=packed) did not rewrite packed")


def _assert_same(a: PackedWeight, b: PackedWeight, why: str) -> None:
    ours, theirs = dict(a.named_buffers()), dict(b.named_buffers())
    assert ours.keys() == theirs.keys() and (a.fmt, a.layout) == (b.fmt, b.layout), why
    for name, tensor in theirs.items():
        mine = ours[name]
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape), f"{why}: {name}"
        same = _bytes(mine) == _bytes(tensor)
        if tensor.dtype == torch.float8_e4m3fn:
            same |= (_bytes(mine) | _bytes(tensor)) == MINUS_ZERO
        assert bool(same.all()), f"{why}: {name}"


def _bytes(x: Tensor) -> Tensor:
    """Flat first: a last dim of one may have any stride."""
    return x.contiguous().flatten().view(torch.uint8)
