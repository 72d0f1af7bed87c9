"""gemm.linear in fp8 for Hopper and for Blackwell, in Gluon, against the op's body, through a model of what Gluon means; and where it may be chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gluon_model import Kernel, Unordered, _Words, launched
from sglang_triton import blackwell_gemm, blackwell_gemm_kernels, hopper_gemm, hopper_gemm_kernels
from sglang_triton.gluon_limits import ARCHS, BLACKWELL, HOPPER, linear_limits
from sglang_triton.kernels import KERNELS
from triton_tolerance import assert_close

from sglang_core.api import DeviceInfo, OpSite, SelectionContext
from sglang_core.api.ops import OPS
from sglang_core.ops.codes import coded

LONG = 128 * 6  # columns of K: more steps than there are stages


@dataclass(frozen=True)
class Own:
    """A kernel of our own, and the barriers that it allocates."""

    launcher: Any
    module: Any
    kernel: str
    barriers: tuple[str, ...]


OWN = {
    HOPPER: Own(hopper_gemm, hopper_gemm_kernels, "_linear_hopper", ("left_full", "right_full", "free")),
    BLACKWELL: Own(
        blackwell_gemm, blackwell_gemm_kernels, "_linear_blackwell", ("full", "free", "done", "drained")
    ),
}  # fmt: skip
DEAF = [(provider, i + 1) for provider, own in OWN.items() for i in range(len(own.barriers))]


@pytest.fixture(params=OWN)
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def multiply(provider: str, *args: Any, **model: Any) -> torch.Tensor:
    """`linear` of the provider, as the model runs it."""
    own = OWN[provider]
    with launched(own.launcher, own.kernel, Kernel(own.module, getattr(own.module, own.kernel), **model)):
        made: torch.Tensor = own.launcher.linear(*args)
    return made


def check(
    provider: str, rows: int, out: int, width: int, fmt: str = "fp8.block128", *, dtype: torch.dtype = torch.bfloat16,
    bias: bool = False, codes: bool = False, **model: Any,
) -> None:  # fmt: skip
    """Two programs share the tiles; rows of x lie apart."""
    torch.manual_seed(0)
    w = OPS["quant.quantize"].body(torch.randn(out, width) * torch.rand(out, 1), fmt)
    x = (torch.randn(rows, width + 16) * torch.logspace(-1, 1, rows)[:, None]).to(dtype)[:, 16:]
    add = torch.randn(out).to(dtype) if bias else None
    given = coded(x, "fp8_block" if fmt == "fp8.block128" else "fp8") if codes else x
    got = multiply(provider, given, w, add, **model)
    assert_close(got, OPS["gemm.linear"].body(x, w, add), scale=200.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fmt", ["fp8.block128", "fp8.token_channel", "fp8.tensor"])
def test_it_is_the_body(provider: str, fmt: str, dtype: torch.dtype) -> None:
    """No size is a multiple of a tile, and each program has two tiles and more steps than stages."""
    check(provider, 130, 392, LONG + 48, fmt, dtype=dtype, bias=True)


@pytest.mark.parametrize(
    "rows, out, width", [(1, 8, 16), (64, 128, 128), (65, 136, 144), (128, 256, 512), (129, 264, 640)]
)
def test_sizes(provider: str, rows: int, out: int, width: int) -> None:
    """A single column of blocks, a right half that is not there, whole tiles, and one element more."""
    check(provider, rows, out, width)


def test_tiles_of_more_than_one_band(provider: str) -> None:
    """17 tiles below each other."""
    check(provider, 17 * 128 - 9, 264, 128)


def test_codes_are_taken_as_they_are(provider: str) -> None:
    check(provider, 70, 136, 272, codes=True)
    check(provider, 70, 136, 272, "fp8.token_channel", codes=True)


def test_leading_dims_and_no_rows(provider: str) -> None:
    w = OPS["quant.quantize"].body(torch.randn(8, 16), "fp8.block128")
    x = torch.randn(2, 3, 16).bfloat16()
    assert_close(multiply(provider, x, w), OPS["gemm.linear"].body(x, w), scale=20.0)
    assert multiply(provider, x[:, :0], w).shape == (2, 0, 8)


@pytest.mark.parametrize("seed", range(1, 6))
def test_in_whatever_order_partitions_and_copies_come(provider: str, seed: int) -> None:
    check(provider, 130, 392, LONG, seed=seed)


@pytest.mark.parametrize("provider, deaf", DEAF, ids=[OWN[name].barriers[i - 1] for name, i in DEAF])
def test_a_barrier_that_nobody_waits_for_shows(provider: str, deaf: int) -> None:
    def all_seeds() -> None:
        for seed in range(12):
            check(provider, 130, 264, LONG, seed=seed, deaf=deaf)

    with pytest.raises(AssertionError):
        all_seeds()


def test_a_missing_fence_shows(provider: str) -> None:
    with pytest.raises(Unordered):
        check(provider, 10, 40, 128, fences=False)


def test_results_that_are_overwritten_before_they_are_copied_show(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Words, "wait_for_stores", lambda self, outstanding: None)

    def all_seeds() -> None:
        for seed in range(12):
            check(provider, 130, 392, 128, seed=seed)

    with pytest.raises(AssertionError):
        all_seeds()


def refused(
    provider: str, path: str = "", dtype: str = "bfloat16", fmt: str = "fp8.block128", **dims: int
) -> str | None:
    sizes = {"in": 512, "out": 256} | {name.strip("_"): size for name, size in dims.items()}
    site = OpSite(op="gemm.linear", layer="Linear", dtype=dtype, fmt=fmt, dims=sizes)
    arch = ARCHS[provider]
    device = DeviceInfo(backend="cuda", path=path or f"cuda/{arch}", name="a device")
    return linear_limits(SelectionContext(device=device, site=site), arch)


def test_what_it_takes(provider: str) -> None:
    assert refused(provider) is None
    assert refused(provider, fmt="fp8.token_channel", dtype="float16") is None
    (other,) = (arch for name, arch in ARCHS.items() if name != provider)
    assert f"is for {ARCHS[provider]}" in str(refused(provider, path=f"cuda/{other}"))
    assert f"not cuda/{other}" in str(refused(provider, path=f"cuda/{other}"))
    assert "not float32" in str(refused(provider, dtype="float32"))
    assert "not int8.token_channel" in str(refused(provider, fmt="int8.token_channel"))
    assert "in=520" in str(refused(provider, in_=520)) and "out=260" in str(refused(provider, out=260))


def test_few_rows_are_tritons(provider: str) -> None:
    few, many = (k for k in KERNELS if k.provider == provider and k.op == "gemm.linear")
    assert few.fn.endswith("gemm:linear") and many.fn.endswith(f"{provider}_gemm:linear")
    assert few.tokens[1] + 1 == many.tokens[0] and many.tokens[1] is None
