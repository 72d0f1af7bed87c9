"""What each kernel refuses: the limits that its op is documented with, as sentences. Nothing of torch_npu is needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sglang_npu import attention_plan, kernels, pools

from sglang_core.api import DeviceInfo, OpSite, SelectionContext, Support
from sglang_core.api.ops import AttnSpec, MLASpec, RopeSpec, RouteSpec

DEVICE = DeviceInfo(backend="npu", path="npu/910b3", name="Ascend 910B3")


def context(op: str, *, dtype: str = "bfloat16", page_size: int = 128, **facts: Any) -> SelectionContext:
    site = OpSite(op=op, layer="Test", dtype=dtype, **facts)
    return SelectionContext(device=DEVICE, site=site, page_size=page_size)


def attn(**changes: Any) -> AttnSpec:
    return AttnSpec(
        **({"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "v_head_dim": 128, "scale": 0.1} | changes)
    )


def mla(**changes: Any) -> MLASpec:
    facts = {"num_heads": 16, "rank": 512, "nope_dim": 128, "rope_dim": 64, "v_head_dim": 128, "scale": 0.1}
    return MLASpec(**(facts | changes))


def test_attention_takes_what_models_have() -> None:
    for spec in (
        attn(),
        attn(head_dim=64, v_head_dim=64),
        attn(num_heads=64, num_kv_heads=1),
        attn(kv_dtype="bfloat16"),
        attn(window=5, has_sinks=True),
    ):
        assert kernels.attention(context("attn.paged", spec=spec)) is None
    assert kernels.attention(context("attn.paged", spec=attn(), page_size=16)) is None


def test_packed_keys_are_as_wide_as_is_documented() -> None:
    wanted = {
        (128, 128, "bfloat16"): (True, 128, 128),
        (72, 40, "bfloat16"): (True, 128, 128),
        (192, 128, "bfloat16"): (True, 192, 128),  # DeepSeek's
        (80, 160, "bfloat16"): (True, 192, 192),
        (192, 128, "float16"): (False, 192, 192),
        (72, 72, "float16"): (False, 80, 80),
        (200, 256, "bfloat16"): (False, 256, 256),
    }
    for (head, value, dtype), (packed, *dims) in wanted.items():
        found = kernels.ragged_dims(head, value, dtype)
        assert (found.packed, [found.head, found.value]) == (packed, dims)
        spec = attn(head_dim=head, v_head_dim=value, causal=False)
        assert kernels.ragged(context("attn.ragged", spec=spec, dtype=dtype)) is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"soft_cap": 3.0}, "soft caps"),
        ({"head_dim": 520}, "520 and 128"),
        ({"num_heads": 130, "num_kv_heads": 2}, "65 sharing"),
        ({"num_heads": 256, "num_kv_heads": 256, "head_dim": 256}, "256 of 256 dims"),
    ],
)
def test_packed_keys_refuse_what_is_not_documented(changes: dict[str, Any], word: str) -> None:
    assert word in (kernels.ragged(context("attn.ragged", spec=attn(**changes))) or "")
    assert "not float32" in (kernels.ragged(context("attn.ragged", spec=attn(), dtype="float32")) or "")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"soft_cap": 3.0}, "soft caps (the vendor's op has no such argument)"),
        ({"tree": True}, "trees"),
        ({"causal": False, "cross": True}, "cross attention"),
        ({"causal": False}, "later keys"),
        ({"kv_dtype": "fp8_e4m3"}, "not in fp8_e4m3"),
        ({"head_dim": 72, "v_head_dim": 72}, "72"),
        ({"head_dim": 192}, "192 and 128"),
        ({"head_dim": 576, "v_head_dim": 576}, "576"),
        ({"num_heads": 130, "num_kv_heads": 2}, "65 sharing"),
        ({"num_heads": 257, "num_kv_heads": 257, "head_dim": 16, "v_head_dim": 16}, "257"),
        ({"num_heads": 256, "num_kv_heads": 256, "head_dim": 256, "v_head_dim": 256}, "65535"),
    ],
)
def test_attention_refuses_what_is_not_documented(changes: dict[str, Any], word: str) -> None:
    assert word in (kernels.attention(context("attn.paged", spec=attn(**changes))) or "")


def test_longer_queries_share_a_call_where_that_is_documented() -> None:
    assert kernels.packed(context("attn.plan", spec=attn(window=5))) is None
    assert "64" in (kernels.packed(context("attn.plan", spec=attn(head_dim=64, v_head_dim=64))) or "")
    assert "float16" in (kernels.packed(context("attn.plan", spec=attn(), dtype="float16")) or "")
    assert "soft caps" in (kernels.packed(context("attn.plan", spec=attn(soft_cap=3.0))) or "")


def test_codes_lie_in_a_layout_of_their_own() -> None:
    def of(kv_layout: str = kernels.CODED_LAYOUT, page_size: int = 128, **changes: Any) -> str | None:
        site = context("attn.paged", spec=attn(**({"kv_dtype": "int8"} | changes)), page_size=page_size)
        return kernels.attention(replace(site, kv_layout=kv_layout))

    assert of() is None
    assert "npu.int8" in (of("canonical") or "")
    assert "canonical" in (of(kv_dtype="auto") or "")
    assert "16 and 128" in (of(page_size=16) or "")
    assert "soft caps" in (of(soft_cap=3.0) or "")
    assert "int8" in (kernels.packed(context("attn.plan", spec=attn(kv_dtype="int8"))) or "")
    assert kernels.CODED_LAYOUT == pools.CODED


@pytest.mark.parametrize("page_size", [1, 8, 24, 528])
def test_pages_are_whole_units(page_size: int) -> None:
    assert "--page-size" in (kernels.attention(context("attn.paged", spec=attn(), page_size=page_size)) or "")


def test_attention_is_of_half_types() -> None:
    assert "float32" in (kernels.attention(context("attn.paged", spec=attn(), dtype="float32")) or "")
    assert "float32" in (kernels.latents(context("attn.mla_paged", spec=mla(), dtype="float32")) or "")


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"num_heads": 12}, "12"), ({"rank": 576}, "576"), ({"rope_dim": 128}, "128"), ({"tree": True}, "trees")],
)
def test_latents(changes: dict[str, Any], word: str) -> None:
    assert kernels.latents(context("attn.mla_paged", spec=mla())) is None
    assert word in (kernels.latents(context("attn.mla_paged", spec=mla(**changes))) or "")


def test_a_page_of_latents_is_whole_blocks() -> None:
    assert [attention_plan.latent_block(size) for size in (16, 64, 128, 384, 8)] == [16, 16, 128, 128, None]
    assert kernels.LATENT_LAYOUT == pools.LATENTS


@pytest.mark.parametrize(
    ("spec", "taken"),
    [
        (RouteSpec(num_experts=256, top_k=8, num_groups=8, top_groups=4), True),
        (RouteSpec(num_experts=2, top_k=1), False),
        (RouteSpec(num_experts=256, top_k=8, num_groups=128, top_groups=64), False),  # two a group; 32 each, aligned
        (RouteSpec(num_experts=4096, top_k=8), False),
    ],
)
def test_routing(spec: RouteSpec, taken: bool) -> None:
    assert (kernels.routing(context("moe.route", spec=spec)) is None) == taken


def test_experts_are_two_or_more_dense_or_of_codes() -> None:
    sizes = {"X": 8, "M": 64, "F": 128}
    assert kernels.experts(context("moe.fused", fmt="dense", dims=sizes)) is None
    for fmt, dtype, in_fractals, by_rows in (
        ("dense", "bfloat16", True, False),
        ("dense", "float32", False, True),
        ("int8.token_channel", "float16", True, False),
    ):
        ctx = context("moe.fused", fmt=fmt, dtype=dtype, dims=sizes)
        assert (kernels.experts_nz(ctx) is None, kernels.wide_experts(ctx) is None) == (in_fractals, by_rows)
    assert "1" in (kernels.experts(context("moe.fused", fmt="dense", dims={"X": 1})) or "")
    assert kernels.experts(context("moe.fused", fmt="int8.token_channel", dims={"X": 8})) is None
    assert "float32" in (kernels.experts(context("moe.fused", fmt="int8.token_channel", dtype="float32")) or "")
    four = {"fmt": "int4.awq.g32", "dims": {"X": 8, "M": 64, "F": 96}}
    assert kernels.int4_experts(context("moe.fused", **four)) is None
    assert "float32" in (kernels.int4_experts(context("moe.fused", dtype="float32", **four)) or "")
    assert "'F': 80" in (kernels.int4_experts(context("moe.fused", fmt="int4.awq.g32", dims={"F": 80})) or "")
    assert "1" in (kernels.int4_experts(context("moe.fused", fmt="int4.pack.g-1", dims={"X": 1})) or "")
    assert "dense" in (kernels.int4_experts(context("moe.fused", fmt="dense")) or "")
    assert "mxfp4" in (kernels.experts(context("moe.fused", fmt="mxfp4.g32", dims={"X": 8})) or "")
    assert "70000" in (kernels.experts(context("moe.fused", fmt="dense", dims={"X": 8, "F": 70000})) or "")


def test_linear_layers() -> None:
    assert kernels.dense_nz(context("gemm.linear", fmt="dense")) is None
    assert "float32" in (kernels.dense_nz(context("gemm.linear", fmt="dense", dtype="float32")) or "")
    assert kernels.dense(context("gemm.linear", fmt="dense", dtype="float32")) is None
    assert kernels.int8(context("gemm.linear", fmt="int8.token_channel", dims={"in": 64, "out": 128})) is None
    assert "float32" in (kernels.int8(context("gemm.linear", fmt="int8.token_channel", dtype="float32")) or "")
    assert "70000" in (kernels.int8(context("gemm.linear", fmt="int8.token_channel", dims={"out": 70000})) or "")


def test_weights_of_four_bits() -> None:
    assert kernels.int4(context("gemm.linear", fmt="int4.awq.g128", dims={"in": 256, "out": 64})) is None
    for fmt in ("int4.gptq.g128.act_order", "w4a8_fp8.g128", "mxfp4.g32"):
        assert fmt in (kernels.int4(context("gemm.linear", fmt=fmt)) or "")
    assert "float32" in (kernels.int4(context("gemm.linear", fmt="int4.pack.g32", dtype="float32")) or "")


def test_rotation() -> None:
    def of(**facts: Any) -> str | None:
        return kernels.rope(
            context("rope.apply", spec=RopeSpec(**({"head_dim": 128, "rotary_dim": 128} | facts)), dims={"Hq": 32})
        )

    assert of() is None
    assert "1024" in (of(head_dim=1024, rotary_dim=1024) or "")
    assert "63" in (of(rotary_dim=63) or "")


def test_what_is_claimed_has_a_kernel() -> None:
    ops = {kernel.op for kernel in kernels.KERNELS}
    claimed = {claim.op for claim in kernels.claims().claims if claim.support is Support.NATIVE}
    assert claimed == ops
