"""What the suite holds `pack` and `unpack` to, for canonical weights of every format, alone and in stacks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sglang_conformance.env import BodyEnv
from sglang_conformance.packing import check_packing

from sglang_core.ops.weight import PackedWeight
from tests.ops.test_quant import FORMATS

Change = Callable[[torch.Tensor], torch.Tensor]


def rebuilt(w: PackedWeight, layout: str, change: Change) -> PackedWeight:
    tensors = {name: change(tensor).contiguous() for name, tensor in w.named_buffers()}
    sizes = {"out_features": w.out_features, "in_features": w.in_features, "num_experts": w.num_experts}
    return PackedWeight(w.fmt, tensors, layout=layout, **sizes)  # type: ignore[arg-type]


def turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2) if x.ndim > 1 else x


def pack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    packed = rebuilt(w, "turned", turned)
    if out is None:
        return packed
    for name, tensor in packed.named_buffers():
        out[name].copy_(tensor)
    return out


def unpack(w: PackedWeight) -> PackedWeight:
    return rebuilt(w, "canonical", turned)


def lossy(w: PackedWeight) -> PackedWeight:
    back = unpack(w)
    back["weight"].view(torch.uint8).flatten()[0] ^= 1
    return back


def moving(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    return pack(w)


def idle(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    return pack(w) if out is None else out


@pytest.mark.parametrize("shape", [(40, 96), (3, 40, 96)], ids=["matrix", "stack"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_an_exact_pair_passes_and_others_do_not(fmt: str, shape: tuple[int, ...]) -> None:
    w = BodyEnv(torch.float32, 0).canonical(fmt, *shape)
    check_packing(w, pack, unpack)
    with pytest.raises(AssertionError, match=r"unpack\(pack\(w\)\) is not w: weight"):
        check_packing(w, pack, lossy)
    with pytest.raises(AssertionError, match="moved it"):
        check_packing(w, moving, unpack)
    with pytest.raises(AssertionError, match="did not rewrite"):
        check_packing(w, idle, unpack)


def test_a_kernel_that_packs_must_unpack_and_name_its_layout() -> None:
    w = BodyEnv(torch.float32, 0).canonical("dense", 8, 8)
    with pytest.raises(AssertionError, match="gives no unpack"):
        check_packing(w, pack, None)
    with pytest.raises(AssertionError, match="layout of their own"):
        check_packing(w, lambda w, out=None: rebuilt(w, "canonical", turned), unpack)


def test_a_device_without_minus_zero_may_keep_a_zero_and_no_other_code() -> None:
    codes = torch.tensor([[0x80, 0x38], [0x00, 0xB8]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    w = PackedWeight("fp8.token_channel", {"weight": codes, "scale": torch.ones(2)}, out_features=2, in_features=2)

    def lacking(gone: int) -> Callable[..., PackedWeight]:
        def made(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
            kept = w["weight"].view(torch.uint8)
            packed = pack(w, out)
            packed["weight"].copy_(turned(kept.masked_fill(kept == gone, 0)).view(torch.float8_e4m3fn))
            return packed

        return made

    check_packing(w, lacking(0x80), unpack)
    with pytest.raises(AssertionError, match=r"unpack\(pack\(w\)\) is not w: weight"):
        check_packing(w, lacking(0xB8), unpack)
