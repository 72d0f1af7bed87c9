"""Provider `jax`: its grouped products, interpreted, against the ops' bodies; when they are chosen, and why not."""

from __future__ import annotations

import pytest
import torch
from test_tpu_matmul import MOST, error, made, rows

pytest.importorskip("jax")

from sglang_conformance.result import Verdict
from sglang_conformance.runner import Suite
from sglang_tpu import jax_experts
from sglang_tpu.backend import HOST, TpuBackend

from sglang_core.api import DeviceInfo, KernelContext, OpSite
from sglang_core.api.ops import OPS, ExpertSpec, PackedWeight
from sglang_core.backend.selection import OpTable
from sglang_core.errors import KernelSelectionError


@pytest.mark.parametrize(
    ("sizes", "columns"), [([5, 0, 130], 128), ([0, 3, 0], 96), ([0, 0, 0], 128), ([64, 64, 7], 192)], ids=str
)
def test_grouped_products_are_the_op(sizes: list[int], columns: int) -> None:
    """The last rows are of no group; the output is no whole block; rows that are not whole lanes are read by columns."""
    x, w, group_sizes = rows(sum(sizes) + 4, columns), made("dense", 3, 200, columns), torch.tensor(sizes).int()
    y, body = jax_experts.grouped(x, w, group_sizes), OPS["gemm.grouped"].body(x, w, group_sizes)
    assert not y[sum(sizes) :].any()
    torch.testing.assert_close(y, body, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_is_added_before_the_one_rounding(dtype: torch.dtype) -> None:
    x, weight, bias = rows(9, 128, dtype=dtype), rows(2, 40, 128, dtype=dtype), rows(2, 40)
    w = PackedWeight("dense", {"weight": weight}, out_features=40, in_features=128, num_experts=2)
    y = jax_experts.grouped(x, w, torch.tensor([4, 5], dtype=torch.int32), bias)
    exact = [
        part.double() @ w.T + b for part, w, b in zip(x.split([4, 5]), weight.double(), bias.double(), strict=True)
    ]
    assert y.dtype == dtype and error(y, torch.cat(exact)) < MOST[dtype]


@pytest.mark.parametrize("act", [ExpertSpec(), ExpertSpec(activation="swiglu_clamped", weight_on_input=True)], ids=str)
def test_fused_experts_are_the_op(act: ExpertSpec) -> None:
    """Some experts are another rank's; the first token has none here."""
    x, w13, w2 = rows(9, 128), made("dense", 4, 256, 128), made("dense", 4, 128, 128)
    ids = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:2] for i in range(9)]).int()
    ids[0] = torch.tensor([1, 4])
    expert_map = torch.tensor([3, -1, 0, 1, -1, 2], dtype=torch.int32)
    weights, more = rows(9, 2).sigmoid(), {"bias13": rows(4, 256), "bias2": rows(4, 128), "expert_map": expert_map}
    y = jax_experts.fused(x, w13, w2, weights, ids, act, **more)
    body = OPS["moe.fused"].body(x, w13, w2, weights, ids, act, **more)
    assert not y[0].any()
    assert error(y, body.double()) < 2 * MOST[torch.float32]


def test_no_token_is_no_row() -> None:
    x, w = torch.zeros(0, 128), made("dense", 2, 40, 128)
    assert jax_experts.grouped(x, w, torch.zeros(2, dtype=torch.int32)).shape == (0, 40)


@pytest.mark.parametrize("op", ["gemm.grouped", "moe.fused"])
def test_they_run_where_they_are_asked_for(op: str) -> None:
    tpu = DeviceInfo(backend="tpu", path="tpu/v6e", name="TPU v6 lite")
    host = next(info for info in TpuBackend().probe() if info.path == HOST)

    def provider(device: DeviceInfo, dtype: str, fmt: str = "dense", *, asked: bool = True) -> str:
        table = OpTable(device, TpuBackend(), ops=OPS, overrides={op: "jax"} if asked else {})
        return table.bind(OpSite(op=op, layer="Experts", dtype=dtype, fmt=fmt)).provider

    assert [provider(tpu, "bfloat16"), provider(host, "float32"), provider(tpu, "bfloat16", asked=False)] == [
        "jax",
        "jax",
        "tpu",
    ]
    with pytest.raises(KernelSelectionError, match="multiplies float32 as bfloat16"):
        provider(tpu, "float32")
    with pytest.raises(KernelSelectionError, match="takes dense weights, not fp8.block128"):
        provider(tpu, "bfloat16", "fp8.block128")


@pytest.mark.parametrize("op", ["gemm.grouped", "moe.fused"])
def test_the_suite_finds_nothing_wrong(op: str) -> None:
    host = next(info for info in TpuBackend().probe() if info.path == HOST)
    kernels = [k for k in TpuBackend().kernels(KernelContext(device=host)) if k.op != op or k.provider == "jax"]
    suite = Suite(TpuBackend(), host, kernels=kernels)
    claimed = [(case, dtype) for case, dtype in suite.select([f"{op}["]) if dtype != torch.float16 and not case.full]
    results = [suite.judge(case, dtype) for case, dtype in claimed[:4]]
    suite.close()
    assert [(r.verdict, r.provider) for r in results] == [(Verdict.EMULATED, "jax")] * 4, results
