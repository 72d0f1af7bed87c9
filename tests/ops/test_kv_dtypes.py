"""Attention over quantised pools against dense softmax in float64 over the very numbers that the codes stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sglang_core.ops.attention import AttnSpec, attn_paged, attn_plan
from sglang_core.ops.mla import attn_mla_paged, attn_mla_plan
from tests.ops.mla_case import mla_case, naive_mla
from tests.ops.paged_case import CPU, PagedCase, attn_spec, naive_paged, paged_case

MIXED = [(13, 1), (0, 40), (3, 3), (600, 1), (9, 17)]
FP8, INT8 = torch.float8_e4m3fn, torch.int8
SCALES = {
    "of one": (torch.ones(1), torch.ones(1)),
    "a tensor": (torch.tensor([0.03]), torch.tensor([0.011])),
    "a head": (torch.tensor([0.03, 0.4]), torch.tensor([0.2, 0.007])),
    "that saturate": (torch.tensor([0.002, 0.03]), torch.tensor([0.02, 0.003])),
}
STEPS = {"exact": {}, "static": {"static": True, "num_tokens": 70, "num_reqs": 7, "max_extend": 64, "num_pages": 160}}


def run(case: PagedCase) -> tuple[Tensor, Tensor]:
    plan = attn_plan(case.spec, case.batch, CPU)
    o, lse = attn_paged(case.q, case.k, case.v, case.pool, 0, case.spec, plan, lse=True)
    return o, lse


def check(case: PagedCase) -> None:
    """Sums in float32 of products that are exact but for the scale's rounding."""
    (o, lse), (want_o, want_lse) = run(case), naive_paged(case)
    size = float(want_o.abs().max())
    torch.testing.assert_close(o.double(), want_o, atol=3e-6 * size, rtol=3e-6)
    torch.testing.assert_close(lse.double(), want_lse, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("spec", [attn_spec(), attn_spec(window=9, soft_cap=3.0)], ids=["plain", "window and soft cap"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("scales", SCALES)
def test_fp8(scales: str, step: str, spec: AttnSpec) -> None:
    check(paged_case(MIXED, spec=spec, kv_dtype=FP8, scales=SCALES[scales], **STEPS[step]))  # type: ignore[arg-type]


@pytest.mark.parametrize("step", STEPS)
def test_int8(step: str) -> None:
    check(paged_case(MIXED, kv_dtype=INT8, **STEPS[step]))  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kv_dtype: torch.dtype) -> None:
    check(paged_case(MIXED, kv_dtype=kv_dtype))


@pytest.mark.parametrize("kv_dtype", [FP8, INT8])
def test_what_a_token_is_stored_as_does_not_depend_on_its_step(kv_dtype: torch.dtype) -> None:
    whole, parts = (paged_case([(0, 30)], kv_dtype=kv_dtype, page_size=4) for _ in range(2))
    run(whole)
    for a, b in ((0, 7), (7, 8), (8, 30)):
        parts.pool.scatter(0, parts.batch.slot_mapping_cpu[a:b], parts.k[a:b], parts.v[a:b])
    page = parts.batch.page_table_cpu[0].long()
    for left, right in zip(whole.pool.leaves, parts.pool.leaves, strict=True):
        left, right = (x[page].reshape(-1, *x.shape[2:])[:30].view(torch.uint8) for x in (left, right))
        assert torch.equal(left, right)


@pytest.mark.parametrize(("kv_dtype", "wrong"), [(FP8, "k"), (FP8, "v"), (INT8, "k"), (INT8, "v")])
def test_without_its_scales_the_result_is_off(kv_dtype: torch.dtype, wrong: str) -> None:
    case = paged_case(MIXED, kv_dtype=kv_dtype, scales=SCALES["a head"] if kv_dtype == FP8 else None)
    plan = attn_plan(case.spec, case.batch, CPU)
    case.pool.scatter(0, case.batch.slot_mapping_cpu, case.k, case.v)
    scale = getattr(case.pool, f"{wrong}_scale")(0)
    scale.copy_(torch.where(scale.isnan(), scale, 1.0))
    o = attn_paged(case.q, None, None, case.pool, 0, case.spec, plan)
    assert isinstance(o, Tensor)
    assert float((o - naive_paged(case)[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("kv_dtype", [FP8, INT8])
def test_latents(kv_dtype: torch.dtype) -> None:
    scales = (torch.tensor([0.02]), torch.tensor([0.05])) if kv_dtype == FP8 else None
    case = mla_case([(9, 1), (0, 20), (31, 3), (300, 1)], kv_dtype=kv_dtype, scales=scales)
    plan = attn_mla_plan(case.spec, case.batch, CPU)
    o = attn_mla_paged(case.q_nope, case.q_pe, case.c_kv, case.k_pe, case.pool, 0, case.spec, plan)
    assert isinstance(o, Tensor)
    torch.testing.assert_close(o.double(), naive_mla(case)[0], atol=2e-5, rtol=1e-4)


def test_a_spec_names_a_dtype_that_exists() -> None:
    with pytest.raises(AssertionError, match="fp8_e4m3"):
        replace(attn_spec(), kv_dtype="fp8")
