"""Which product a linear layer in fp8 gets, by GPU, size and build of PyTorch; and the reasons against the others."""

from __future__ import annotations

from typing import Any

import pytest
from sglang_cuda.backend import CudaBackend
from sglang_triton.gpu import kernels

from sglang_core.api import DeviceInfo, OpSite
from sglang_core.api.ops import OPS
from sglang_core.backend.selection import BoundOp, OpTable

TRITON, ROWS, BLOCKS = (
    "sglang_triton.gemm:linear",
    "sglang_triton.gpu.linear:row_scaled",
    "sglang_triton.gpu.linear:block_scaled",
)


def bound(fmt: str, arch: int = 90, out: int = 256, width: int = 1024, dtype: str = "bfloat16") -> BoundOp:
    info = DeviceInfo(backend="cuda", path=f"cuda/sm_{arch}", name="test")
    table = OpTable(info, CudaBackend(), ops=OPS, page_size=16)
    return table.bind(OpSite(op="gemm.linear", layer="Linear", dtype=dtype, fmt=fmt, dims={"in": width, "out": out}))


def fns(op: BoundOp) -> list[str]:
    return [kernel.fn for kernel in op.kernels]


def test_few_rows_and_many() -> None:
    assert fns(bound("fp8.token_channel")) == fns(bound("fp8.tensor", arch=89)) == [TRITON, ROWS]
    assert fns(bound("fp8.block128")) == [TRITON, BLOCKS]
    assert fns(bound("fp8.tensor.static")) == ["sglang_triton.gpu.linear:static_scaled"]


@pytest.mark.parametrize(
    ("fmt", "facts", "reason"),
    [
        ("fp8.token_channel", {"arch": 80}, "from sm_89 on; this is sm_80"),
        ("fp8.token_channel", {"out": 200}, "multiples, not out=200"),
        ("fp8.token_channel", {"dtype": "float16"}, "gives bfloat16, not float16"),
        ("fp8.block128", {"width": 640}, "multiples, not in=640"),
        ("fp8.block128", {"arch": 100}, "on sm_90 alone; this is sm_100"),
    ],
)
def test_what_the_library_does_not_take_is_tritons(fmt: str, facts: dict[str, Any], reason: str) -> None:
    op = bound(fmt, **facts)
    assert op.provider == "triton" and fns(op) == [TRITON]
    assert any(kernel.startswith("cuda") and reason in why for kernel, why in op.refused)


def test_blocks_need_a_newer_cuda_than_some_builds_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "version", lambda name: "2.11.0+cu126")
    op = bound("fp8.block128")
    assert fns(op) == [TRITON]
    assert any("from CUDA 12.9 on; this PyTorch is built for 12.6" in why for _, why in op.refused)
    monkeypatch.setattr(kernels, "version", lambda name: "2.11.0+cu130")
    assert fns(bound("fp8.block128")) == [TRITON, BLOCKS]
