"""The calls that `tune` makes: each of them is the same call of the kernel and of the body, on two sets of activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sglang_core.backend.devices import open_device
from sglang_core.backend.interface import RuntimeContext
from sglang_core.backend.kernel import OpSite
from sglang_core.backend.selection import OpTable
from sglang_core.backend.torch_runtime import TorchRuntime
from sglang_core.bench.op_calls import OpCall, Operands, grouped_of_fused
from sglang_core.bench.tune import MAKERS
from sglang_core.config import EngineConfig
from sglang_core.engine.explain import bound_model
from sglang_core.engine.resolve import resolve
from sglang_core.ops import OPS
from sglang_core.ops.attention_plan import AttnSpec
from sglang_core.ops.mla import MLASpec
from sglang_core.ops.moe import ExpertSpec

PAGED = AttnSpec(num_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=8, scale=0.3, window=12, has_sinks=True)
LATENT = MLASpec(num_heads=4, rank=16, nope_dim=8, rope_dim=4, v_head_dim=8, scale=0.3)
EXPERTS = {"X": 4, "K": 2, "M": 64, "F": 32}


def operands() -> Operands:
    chosen = open_device("cpu")
    table = OpTable(chosen.info, chosen.backend, ops=OPS, kernels=(), page_size=4)
    generator = torch.Generator().manual_seed(0)
    runtime = TorchRuntime(RuntimeContext(devices=(chosen.info,)))
    return Operands(runtime=runtime, table=table, context=20, generator=generator)


def check(calls: list[OpCall]) -> None:
    for call in calls:
        first, second = (kernel() for kernel in call.kernel)
        assert torch.isfinite(first).all()
        assert not torch.equal(first, second), "two sets of activations"
        for kernel, body in zip(call.kernel, call.body, strict=True):
            torch.testing.assert_close(kernel(), body())


@pytest.mark.parametrize("fmt", ["dense", "fp8.block128", "int4.awq.g32", "mxfp4.g32"])
@pytest.mark.parametrize("op", ["gemm.linear", "moe.fused"])
def test_products(op: str, fmt: str) -> None:
    dims, spec = ({"in": 64, "out": 96}, None) if op == "gemm.linear" else (EXPERTS, ExpertSpec())
    make = operands()
    bound = make.table.bind(OpSite(op=op, layer="L", dtype="float32", fmt=fmt, spec=spec, dims=dims))
    calls = list(MAKERS[op](make, bound, 3))
    assert len(calls) == 1
    assert calls[0].kernel[0]().shape == (3, 96 if op == "gemm.linear" else 64)
    check(calls)


def test_grouped_has_both_products_of_an_expert() -> None:
    make = operands()
    bound = make.table.bind(OpSite(op="moe.fused", layer="L", dtype="float32", fmt="dense", dims=EXPERTS))
    sites = grouped_of_fused(make.table, bound)
    assert [(b.site.dims["in"], b.site.dims["out"]) for b in sites] == [(64, 64), (32, 64)]
    calls = [call for b in sites for call in MAKERS["gemm.grouped"](make, b, 3)]
    assert [call.kernel[0]().shape[0] for call in calls] == [6, 6]
    check(calls)


@pytest.mark.parametrize(("op", "spec"), [("attn.paged", PAGED), ("attn.mla_paged", LATENT)])
@pytest.mark.parametrize(
    ("tokens", "titles"), [(2, ["decode of 2"]), (17, ["decode of 17", "prompt of 17"]), (300, ["prompt of 300"])]
)
def test_attention_is_decoding_and_prompts(op: str, spec: AttnSpec | MLASpec, tokens: int, titles: list[str]) -> None:
    make = operands()
    site = OpSite(op=op, layer="L", dtype="float32", spec=spec)
    plan = replace(site, op="attn.plan" if op == "attn.paged" else "attn.mla_plan")
    bound = make.table.bind_group([site, plan])[op]
    calls = list(MAKERS[op](make, bound, tokens))
    assert [call.title.split(",")[0] for call in calls] == titles
    check(calls)


def test_a_model_over_ranks_is_tuned_in_shares() -> None:
    def width(tp_size: int) -> int:
        config = EngineConfig.from_flat(model_path="demo", device="cpu", tp_size=tp_size)
        table, _ = bound_model(resolve(config))
        return next(b.site.dims["F"] for b in table.bound_ops if b.site.op == "act.gated")

    assert width(2) * 2 == width(1)
