"""gemm.linear in fp8 for Hopper, in Gluon, against the op's body, through a model of what Gluon means; and where it may be chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gluon_model import Kernel, Unordered, _Words, launched
from sglang_triton import hopper_gemm, hopper_gemm_kernels
from sglang_triton.hopper_limits import hopper_linear_limits
from sglang_triton.kernels import HOPPER, KERNELS
from triton_tolerance import assert_close

from sglang_core.api import DeviceInfo, OpSite, SelectionContext
from sglang_core.api.ops import OPS
from sglang_core.ops.codes import coded

BARRIERS = ("left_full", "right_full", "free")
LONG = 128 * 6  # columns of K: more steps than there are stages


def check(
    rows: int, out: int, width: int, fmt: str = "fp8.block128", *, dtype: torch.dtype = torch.bfloat16, bias: bool = False,
    codes: bool = False, **model: Any,
) -> None:  # fmt: skip
    """Two programs share the tiles; rows of x lie apart."""
    torch.manual_seed(0)
    w = OPS["quant.quantize"].body(torch.randn(out, width) * torch.rand(out, 1), fmt)
    x = (torch.randn(rows, width + 16) * torch.logspace(-1, 1, rows)[:, None]).to(dtype)[:, 16:]
    add = torch.randn(out).to(dtype) if bias else None
    kernel = Kernel(hopper_gemm_kernels, hopper_gemm_kernels._linear_hopper, **model)
    with launched(hopper_gemm, "_linear_hopper", kernel):
        given = coded(x, "fp8_block" if fmt == "fp8.block128" else "fp8") if codes else x
        got = hopper_gemm.linear(given, w, add)
    assert_close(got, OPS["gemm.linear"].body(x, w, add), scale=200.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", ["fp8.block128", "fp8.token_channel", "fp8.tensor"])
def test_it_is_the_body(fmt: str, dtype: torch.dtype) -> None:
    """No size is a multiple of a tile, and each program has two tiles and more steps than stages."""
    check(130, 392, LONG + 48, fmt, dtype=dtype, bias=True)


@pytest.mark.parametrize(
    "rows, out, width", [(1, 8, 16), (64, 128, 128), (65, 136, 144), (128, 256, 512), (129, 264, 640)]
)
def test_sizes(rows: int, out: int, width: int) -> None:
    """A single column of blocks, a right half that is not there, whole tiles, and one element more."""
    check(rows, out, width)


def test_tiles_of_more_than_one_band() -> None:
    """17 tiles below each other."""
    check(17 * 128 - 9, 264, 128)


def test_codes_are_taken_as_they_are() -> None:
    check(70, 136, 272, codes=True)
    check(70, 136, 272, "fp8.token_channel", codes=True)


def test_leading_dims_and_no_rows() -> None:
    w = OPS["quant.quantize"].body(torch.randn(8, 16), "fp8.block128")
    x = torch.randn(2, 3, 16).bfloat16()
    kernel = Kernel(hopper_gemm_kernels, hopper_gemm_kernels._linear_hopper)
    with launched(hopper_gemm, "_linear_hopper", kernel):
        assert_close(hopper_gemm.linear(x, w), OPS["gemm.linear"].body(x, w), scale=20.0)
        assert hopper_gemm.linear(x[:, :0], w).shape == (2, 0, 8)


@pytest.mark.parametrize("seed", range(1, 6))
def test_in_whatever_order_partitions_and_copies_come(seed: int) -> None:
    check(130, 392, LONG, seed=seed)


@pytest.mark.parametrize("deaf", range(1, 1 + len(BARRIERS)), ids=BARRIERS)
def test_a_barrier_that_nobody_waits_for_shows(deaf: int) -> None:
    def all_seeds() -> None:
        for seed in range(12):
            check(130, 264, LONG, seed=seed, deaf=deaf)

    with pytest.raises(AssertionError):
        all_seeds()


def test_a_missing_fence_shows() -> None:
    with pytest.raises(Unordered):
        check(10, 40, 128, fences=False)


def test_results_that_are_overwritten_before_they_are_copied_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Words, "wait_for_stores", lambda self, outstanding: None)

    def all_seeds() -> None:
        for seed in range(12):
            check(130, 392, 128, seed=seed)

    with pytest.raises(AssertionError):
        all_seeds()


def refused(path: str = "cuda/sm_90", dtype: str = "bfloat16", fmt: str = "fp8.block128", **dims: int) -> str | None:
    sizes = {"in": 512, "out": 256} | {name.strip("_"): size for name, size in dims.items()}
    site = OpSite(op="gemm.linear", layer="Linear", dtype=dtype, fmt=fmt, dims=sizes)
    return hopper_linear_limits(
        SelectionContext(device=DeviceInfo(backend="cuda", path=path, name="a device"), site=site)
    )


def test_what_it_takes() -> None:
    assert refused() is None and refused(fmt="fp8.token_channel", dtype="float16") is None
    assert "not cuda/sm_100" in str(refused(path="cuda/sm_100"))
    assert "not float32" in str(refused(dtype="float32"))
    assert "not int8.token_channel" in str(refused(fmt="int8.token_channel"))
    assert "in=520" in str(refused(in_=520)) and "out=260" in str(refused(out=260))


def test_few_rows_are_tritons() -> None:
    few, many = (k for k in KERNELS if k.provider == HOPPER and k.op == "gemm.linear")
    assert few.fn.endswith("gemm:linear") and many.fn.endswith("hopper_gemm:linear")
    assert few.tokens[1] + 1 == many.tokens[0] and many.tokens[1] is None
