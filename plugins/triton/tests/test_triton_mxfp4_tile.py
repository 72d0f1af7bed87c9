"""mxfp4 weights scaled as they are decoded: the assembly by a model of its instructions, the rest through the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ptx_model import numbers, ran
from sglang_triton import tuning
from sglang_triton.gemm import linear, linear_invariant
from sglang_triton.moe import grouped_invariant
from sglang_triton.mxfp4_tile import SCALED, factors
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS, PackedWeight

SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NUMBERS = np.array([*SIZES, *(-size for size in SIZES)])


@triton.jit
def _factors(scale, some, rest):
    at = tl.arange(0, 256)
    one, other = factors(tl.load(scale + at))
    tl.store(some + at, one.to(tl.int16, bitcast=True))
    tl.store(rest + at, other.to(tl.int16, bitcast=True))


def both_factors() -> tuple[np.ndarray, np.ndarray]:
    """uint32[256] each: for every code of a scale, a register that has its factor twice."""
    some, rest = torch.empty(2, 256, dtype=torch.int16)
    _factors[(1,)](torch.arange(256, dtype=torch.uint8), some, rest)
    bits = (x.numpy().view(np.uint16).astype(np.uint32) for x in (some, rest))
    one, other = (x | x << 16 for x in bits)
    return one, other


def test_factors_are_finite_but_for_a_scale_that_is_no_number() -> None:
    """And no smaller than 2^-1: the number over 2^126 times the first of them is exact, a subnormal or not."""
    some, rest = (numbers(x)[:, 0] for x in both_factors())
    assert np.array_equal((some * rest)[:255], 2.0 ** (np.arange(255) - 1))
    assert min(some.min(), rest[:255].min()) >= 0.5 and np.isnan(rest[255])


def test_every_byte_times_every_scale() -> None:
    """To the bit, signs of zeros and infinities included: what float32 makes of number times scale is a bfloat16."""
    scale = np.arange(256)[:, None]
    words = (
        np.arange(0, 256)[:, None] + np.array([0, 67, 134, 201])
    ) % 256  # every byte at each of a word's four places
    word = (words << 8 * np.arange(4)).sum(axis=1).astype(np.uint32)[None, :]
    some, rest = (x[:, None] for x in both_factors())
    out = ran(SCALED, {"$4": word, "$5": some, "$6": rest})
    with np.errstate(over="ignore"):
        by = np.where(scale == 255, np.nan, 2.0 ** (scale - 127.0))[..., None]
    for place in range(4):
        codes = word[..., None] >> np.array([0, 16], dtype=np.uint32) + 4 * place & 15
        want = torch.from_numpy(NUMBERS[codes] * by).float()
        got = torch.from_numpy(numbers(out[f"${place}"])).float()
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(1).view(torch.int32), want.nan_to_num(1).view(torch.int32))


@pytest.fixture(params=["sm_80", "sm_90", tuning.INTERPRETER])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose columns are in the order of one warp's products, or of a warp group's."""
    monkeypatch.setattr(tuning, "current_arch", lambda: request.param)
    tuning.choose.cache_clear()
    return str(request.param)


def packed(rows: int, columns: int, scale: torch.Tensor) -> PackedWeight:
    tensors = {"weight": torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8), "scale": scale}
    return PackedWeight("mxfp4.g32", tensors, out_features=rows, in_features=columns)


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("columns", [4, 32, 128, 200, 256, 360, 328])
@pytest.mark.parametrize("num_tokens", [1, 70])
def test_columns_of_any_number_of_steps(columns: int, num_tokens: int) -> None:
    """Scales far apart, so that a group that is scaled by another's shows."""
    torch.manual_seed(0)
    groups = -(-columns // 32)
    w = packed(70, columns, torch.randint(110, 140, (70, groups), dtype=torch.uint8))
    x = torch.randn(num_tokens, columns + 8).bfloat16()[:, 8:]
    dense = OPS["quant.dequantize"].body(w, torch.float32).double().T
    want, summed = x.double() @ dense, x.double().abs() @ dense.abs()
    got = linear(x, w)
    assert bool(((got.double() - want).abs() <= want.abs() * 2**-8 + summed * 1e-6).all())
    assert torch.equal(linear_invariant(x[:1], w), linear_invariant(x, w)[:1])


@pytest.mark.usefixtures("arch")
def test_scales_at_both_ends() -> None:
    """The smallest is a subnormal, of the largest a number of 4 is infinite, and 255 is none."""
    w = packed(
        6, 64, torch.tensor([[0, 127], [1, 127], [253, 127], [254, 127], [255, 127], [127, 127]], dtype=torch.uint8)
    )
    w["weight"][:] = 0x31  # 0.5 and 1.5
    x = torch.zeros(1, 64).bfloat16()
    x[0, :2], x[0, 32] = torch.tensor([1.0, 2.0]), 1.0
    w["weight"][:, 16:] = 0
    got = linear(x, w)[0].double()
    want = 3.5 * 2.0 ** (torch.tensor([0, 1, 253, 254, 255, 127]).double() - 127)
    want[3], want[4] = float("inf"), float("nan")
    assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))
    assert bool(got[4].isnan())


@pytest.mark.usefixtures("arch")
def test_experts() -> None:
    """Of none, one and more rows than a tile has; a row's result is the same in any company."""
    torch.manual_seed(0)
    w = OPS["quant.quantize"].body(torch.randn(3, 150, 360) * 360**-0.5, "mxfp4.g32")
    x, sizes = torch.randn(77, 360).bfloat16(), torch.tensor([0, 1, 76], dtype=torch.int32)
    got = grouped_invariant(x, w, sizes)
    assert_close(got, OPS["gemm.grouped"].body(x, w, sizes))
    assert torch.equal(grouped_invariant(x[:1], w, torch.tensor([0, 1, 0], dtype=torch.int32)), got[:1])


@pytest.mark.usefixtures("arch")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_are_multiplied_group_by_group(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    w, x = packed(70, 360, torch.randint(120, 130, (70, 12), dtype=torch.uint8)), torch.randn(5, 360).to(dtype)
    assert_close(linear(x, w), OPS["gemm.linear"].body(x, w), scale=100)
