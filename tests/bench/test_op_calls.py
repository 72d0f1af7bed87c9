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
from sglang_core.bench.attention_calls import batch_of
from sglang_core.bench.calls import COMPARED, build, calls_of
from sglang_core.bench.op_calls import OpCall, Operands, grouped_of_fused
from sglang_core.config import EngineConfig
from sglang_core.engine.explain import bound_model
from sglang_core.engine.resolve import resolve
from sglang_core.ops import OPS
from sglang_core.ops.attention_plan import AttnSpec
from sglang_core.ops.mla import MLASpec
from sglang_core.ops.moe import ExpertSpec
from sglang_core.ops.rope import RopeSpec
from sglang_core.runner.verify import tensors_of

PAGED = AttnSpec(num_heads=4, num_kv_heads=2, head_dim=8, v_head_dim=8, scale=0.3, window=12, has_sinks=True)
LATENT = MLASpec(num_heads=4, rank=16, nope_dim=8, rope_dim=4, v_head_dim=8, scale=0.3)
EXPERTS = {"X": 4, "K": 2, "M": 64, "F": 32}


def operands() -> Operands:
    chosen = open_device("cpu")
    table = OpTable(chosen.info, chosen.backend, ops=OPS, kernels=(), page_size=4)
    generator = torch.Generator().manual_seed(0)
    runtime = TorchRuntime(RuntimeContext(devices=(chosen.info,)))
    return Operands(runtime=runtime, table=table, context=20, generator=generator)


def compared(op: str, make: Operands, site: OpSite, tokens: int) -> list[OpCall]:
    """The calls on which providers are compared."""
    bound = next(b for b in make.table.bound_ops if b.site == site)
    return [build(COMPARED[op], make, bound, step) for step in COMPARED[op].steps(tokens, make.context)]


def check(calls: list[OpCall]) -> None:
    for call in calls:
        first, second = (next(iter(tensors_of(kernel()))) for kernel in call.kernel)
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
    calls = list(calls_of(make, bound, 3))
    assert len(calls) == 1
    assert calls[0].kernel[0]().shape == (3, 96 if op == "gemm.linear" else 64)
    check(calls)


def test_grouped_has_both_products_of_an_expert() -> None:
    make = operands()
    bound = make.table.bind(OpSite(op="moe.fused", layer="L", dtype="float32", fmt="dense", dims=EXPERTS))
    sites = grouped_of_fused(make.table, bound)
    assert [(b.site.dims["in"], b.site.dims["out"]) for b in sites] == [(64, 64), (32, 64)]
    calls = [call for b in sites for call in calls_of(make, b, 3)]
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
    calls = list(calls_of(make, bound, tokens))
    assert [call.title.split(",")[0] for call in calls] == titles
    check(calls)


@pytest.mark.parametrize("norms", [True, False])
def test_all_between_projections_writes_its_keys(norms: bool) -> None:
    """Queries see the new keys of their own set, whatever set was called before."""
    make = operands()
    paged = OpSite(op="attn.paged", layer="L", dtype="float32", spec=PAGED)
    rotary = replace(paged, op="rope.apply", spec=RopeSpec(head_dim=8, rotary_dim=4))
    parts = (*([replace(paged, op="norm.rms", spec=None)] if norms else []), rotary, paged)
    whole = replace(paged, op="attn.rope_paged", parts=parts)
    make.table.bind_group([paged, replace(paged, op="attn.plan"), whole])
    calls = compared("attn.rope_paged", make, whole, 17)
    assert [call.title for call in calls] == ["decode of 17, context 20, window 12", "prompt of 17, window 12"]
    check(calls)


@pytest.mark.parametrize(
    ("tokens", "titles"), [(2, ["decode of 2"]), (17, ["decode of 17", "prompt of 17"]), (300, [])]
)
def test_latents_are_written_where_providers_are_compared(tokens: int, titles: list[str]) -> None:
    """Of long prompts a layer makes keys and values."""
    make = operands()
    site = OpSite(op="attn.mla_paged", layer="L", dtype="float32", spec=LATENT)
    make.table.bind_group([site, replace(site, op="attn.mla_plan"), replace(site, op="kv.write_mla")])
    calls = compared("attn.mla_paged", make, site, tokens)
    assert [call.title.split(",")[0] for call in calls] == titles
    for call in calls:
        assert all(part is not None for part in call.kernel[0].args[:4])  # type: ignore[attr-defined]
    check(calls)


@pytest.mark.parametrize(
    ("op", "spec", "dims"),
    [
        ("act.gated", "gelu", {"F": 48}),
        ("norm.rms", None, {"M": 48}),
        ("norm.add_rms", None, {"M": 48}),
        ("gemm.linear_gated", "silu", {"in": 64, "out": 96}),
        ("attn.ragged", replace(PAGED, window=None, has_sinks=False), {}),
    ],
)
def test_the_rest(op: str, spec: object, dims: dict[str, int]) -> None:
    make = operands()
    bound = make.table.bind(OpSite(op=op, layer="L", dtype="float32", fmt="dense", spec=spec, dims=dims))
    calls = compared(op, make, bound.site, 20)
    assert len(calls) == 1
    check(calls)


def test_equal_sites_get_equal_operands() -> None:
    """Whatever was drawn before: results of two providers are compared."""
    make = operands()
    site = OpSite(op="act.gated", layer="L", dtype="float32", spec="silu", dims={"F": 8})
    make.table.bind(site)
    (before,), (after,) = (compared("act.gated", make, site, 3) for _ in range(2))
    assert torch.equal(before.kernel[1](), after.kernel[1]())


def test_a_batch_is_of_whole_tensors() -> None:
    """Kernels on a host take addresses: a column of a table of two is none."""
    batch = batch_of([(3, 1), (5, 2)], 4, torch.Generator().manual_seed(0))
    tensors = [x for x in (getattr(batch, name) for name in batch.__slots__) if isinstance(x, torch.Tensor)]
    assert len(tensors) == 5
    assert all(x.is_contiguous() and x.dtype == torch.int32 for x in tensors)


def test_a_model_over_ranks_is_tuned_in_shares() -> None:
    def width(tp_size: int) -> int:
        config = EngineConfig.from_flat(model_path="demo", device="cpu", tp_size=tp_size)
        table, _ = bound_model(resolve(config))
        return next(b.site.dims["F"] for b in table.bound_ops if b.site.op == "act.gated")

    assert width(2) * 2 == width(1)
