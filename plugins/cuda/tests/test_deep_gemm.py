"""DeepGEMM is not installed here: its one function that is called, with the checks of its release 1.0.0, stands for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from sglang_cuda.backend import CudaBackend
from sglang_triton.gpu import optional
from torch import Tensor

from sglang_core.api import DeviceInfo, OpSite
from sglang_core.api.ops import OPS
from sglang_core.backend.selection import BoundOp, OpTable

LINEAR = "sglang_cuda.deep_gemm_kernels:linear"


def gemm_fp8_fp8_bf16_nt(lhs: tuple[Tensor, Tensor], rhs: tuple[Tensor, Tensor], out: Tensor) -> None:
    """Scales of lhs by 1 x 128, of rhs by 128 x 128."""
    (a, a_scale), (b, b_scale) = lhs, rhs
    (m, k), n = a.shape, b.shape[0]
    assert n % 64 == 0 and k % 128 == 0 and out.shape == (m, n)
    assert a_scale.shape == (m, -(-k // 128)) and b_scale.shape == (-(-n // 128), -(-k // 128))
    assert (a.dtype, b.dtype, out.dtype) == (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16)
    assert all(x.is_contiguous() for x in (a, b, b_scale, out))
    wide_a = a.float() * a_scale.repeat_interleave(128, dim=1)
    wide_b = b.float() * b_scale.repeat_interleave(128, dim=0)[:n].repeat_interleave(128, dim=1)
    out.copy_(wide_a @ wide_b.T)


def bound(*, out: int = 192, arch: int = 90, wanted: str | None = None) -> BoundOp:
    info = DeviceInfo(backend="cuda", path=f"cuda/sm_{arch}", name="test")
    overrides = {"gemm.linear": wanted} if wanted else {}
    table = OpTable(info, CudaBackend(), ops=OPS, page_size=16, overrides=overrides)
    dims = {"in": 512, "out": out}
    return table.bind(OpSite(op="gemm.linear", layer="Linear", dtype="bfloat16", fmt="fp8.block128", dims=dims))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("deep_gemm")
    module.gemm_fp8_fp8_bf16_nt = gemm_fp8_fp8_bf16_nt  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    monkeypatch.delitem(sys.modules, "sglang_cuda.deep_gemm_kernels", raising=False)
    monkeypatch.setattr(optional, "version", lambda name: "1.0.0")
    yield
    sys.modules.pop("sglang_cuda.deep_gemm_kernels", None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_op_for_many_rows(biased: bool) -> None:
    """192 rows of weight: no multiple of 128, which cuBLASLt would ask for."""
    op = bound()
    assert op.provider == "deep_gemm" and op.kernels[-1].fn == LINEAR
    torch.manual_seed(0)
    w = OPS["quant.quantize"].body(torch.randn(192, 512), "fp8.block128")
    x, bias = torch.randn(80, 528).bfloat16()[:, 16:], torch.randn(192).bfloat16() if biased else None
    for rows in (80, 70, 2):
        want = OPS["gemm.linear"].body(x[:rows], w, bias)
        torch.testing.assert_close(op.fn(x[:rows], w, bias), want, rtol=2**-6, atol=0.2)


@pytest.mark.usefixtures("installed")
def test_cublas_comes_first_where_it_takes_the_sizes_and_any_may_be_asked_for() -> None:
    assert bound(out=256).provider == "cuda"
    assert bound(out=256, wanted="deep_gemm").kernels[-1].fn == LINEAR
    refused = bound(arch=100)
    assert refused.provider == "triton" and any("is for sm_90; this is sm_100" in why for _, why in refused.refused)


def test_without_it_triton_runs_and_explain_says_how_to_get_it() -> None:
    op = bound()
    assert op.provider == "triton" and "sglang_cuda.deep_gemm_kernels" not in sys.modules
    assert any("get deep-gemm>=1.0,<1.1 from https://github.com/deepseek-ai/DeepGEMM" in why for _, why in op.refused)
