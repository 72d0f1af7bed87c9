"""Which kernels a model gets on an NVIDIA GPU, by what `explain` says: no GPU is needed to choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sglang_cuda.backend import CudaBackend

from sglang_core.api import DeviceInfo, OpSite
from sglang_core.api.ops import OPS
from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.selection import DECOMPOSED, OpTable
from sglang_core.bench.comparison import plan_comparison
from sglang_core.config import EngineConfig
from sglang_core.engine.explain import explain

H200 = DeviceInfo(backend="cuda", path="cuda/sm_90", name="NVIDIA H200", total_memory=139 * 2**30)


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
def test_every_op_of_a_model_has_a_kernel(quantization: str | None) -> None:
    device = ChosenDevice(backend=CudaBackend(), info=H200, reason="")
    rows = explain(EngineConfig.from_flat(model_path="demo", device="cuda", quantization=quantization), device)
    found = {(row.op, row.fmt): row.provider for row in rows}
    assert {"attn.paged", "norm.rms", "act.gated", "sample.sample"} <= {op for op, _ in found}
    for (op, fmt), provider in found.items():
        own = op == "gemm.linear" and fmt in ("dense", "fp8.token_channel")
        assert provider == ("cuda" if own else "triton"), (op, fmt)


def test_dense_layers_are_summed_in_one_order_where_that_is_asked_for() -> None:
    device = ChosenDevice(backend=CudaBackend(), info=H200, reason="")
    rows = explain(EngineConfig.from_flat(model_path="demo", device="cuda", deterministic=True), device)
    found = {kernel for row in rows if row.op == "gemm.linear" for kernel in row.kernels}
    assert found == {"sglang_triton.gemm:linear_invariant"}


def test_dense_weights_are_streamed_by_triton_where_that_is_asked_for() -> None:
    """Up to as many rows as a tile has; the library has the others, and all of them where nobody asks."""
    table = OpTable(H200, CudaBackend(), ops=OPS, page_size=16, overrides={"gemm.linear": "streamed"})
    bound = table.bind(OpSite(op="gemm.linear", layer="Layer", dtype="bfloat16", fmt="dense"))
    assert [(kernel.tokens, kernel.fn) for kernel in bound.kernels] == [
        ((1, 16), "sglang_triton.gemm:linear"),
        ((17, None), "sglang_triton.gpu.linear:dense"),
    ]
    rows = explain(
        EngineConfig.from_flat(model_path="demo", device="cuda"),
        ChosenDevice(backend=CudaBackend(), info=H200, reason=""),
    )
    assert "streamed" not in {row.provider for row in rows}


def test_products_of_our_own_are_asked_for_by_format() -> None:
    """They know fp8 alone, and the head of such a model is dense."""
    device = ChosenDevice(backend=CudaBackend(), info=H200, reason="")
    asked = EngineConfig.from_flat(
        model_path="demo", device="cuda", quantization="fp8", kernel=("gemm.linear[fp8.token_channel]=hopper",)
    )
    rows = [row for row in explain(asked, device) if row.op == "gemm.linear"]
    assert {(row.fmt, row.provider) for row in rows} == {("fp8.token_channel", "hopper"), ("dense", "cuda")}


def test_providers_of_one_format_are_compared_where_weights_have_it() -> None:
    device = ChosenDevice(backend=CudaBackend(), info=H200, reason="")
    fp8 = EngineConfig.from_flat(model_path="demo", device="cuda", quantization="fp8")
    comparison = plan_comparison(fp8, "gemm.linear", ["hopper", "streamed"], context=100, device=device)
    assert {
        other.name: {site.fmt for site in comparison.sites if comparison.differs(other, site)}
        for other in comparison.others
    } == {"hopper": {"fp8.token_channel"}, "streamed": {"dense"}}
    assert comparison.flags("hopper") == "--kernel gemm.linear[fp8.token_channel]=hopper"
    assert not comparison.refused and any("LMHead" in note for note in comparison.notes)


@pytest.mark.parametrize("op", ["moe.fused", "gemm.grouped", "lora.experts", "attn.mla_project"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_experts_and_heads_are_multiplied_in_tiles_of_one_size_where_that_is_asked_for(
    op: str, deterministic: bool
) -> None:
    table = OpTable(H200, CudaBackend(), ops=OPS, page_size=16, deterministic=deterministic)
    bound = table.bind(OpSite(op=op, layer="Layer", dtype="bfloat16", fmt="dense"))
    assert bound.provider == "triton" and bound.kernels[0].fn.endswith("_invariant") == deterministic


@pytest.mark.parametrize(("arch", "own", "foreign"), [("90", "hopper", "blackwell"), ("100", "blackwell", "hopper")])
def test_kernels_that_nothing_takes_unasked_can_be_compared(arch: str, own: str, foreign: str) -> None:
    """`tune --providers` has the group of each, its plan among it, and says of the others what they lack."""
    info = replace(H200, path=f"cuda/sm_{arch}")
    device = ChosenDevice(backend=CudaBackend(), info=info, reason="")
    config = EngineConfig.from_flat(model_path="demo", device="cuda")
    comparison = plan_comparison(config, "attn.paged", [], context=4096, device=device)
    assert comparison.in_force.name == "triton"
    assert [site.op for site in comparison.sites] == ["attn.rope_paged"]
    table = next(other.table for other in comparison.others if other.name == own)
    assert {b.site.op: b.provider for b in table.bound_ops if b.site.layer == "Attention"} == {
        "attn.paged": own, "attn.plan": own, "attn.rope_paged": DECOMPOSED,
    }  # fmt: skip
    assert comparison.refused[foreign].startswith("at attn.paged in Attention (bfloat16): is for sm_")
    assert comparison.flags(own) == f"--kernel attn.paged={own}"
