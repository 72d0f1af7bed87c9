"""attn.mla_paged against its body, through the interpreter."""

from __future__ import annotations

import pytest
import torch
from sglang_triton import attention_plan
from triton_attention_cases import BATCHES, CPU, DTYPES, KV_DTYPES, Case, Reqs, latent_spec

from sglang_core.api.ops import MLASpec


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reqs", BATCHES.values(), ids=BATCHES)
def test_mla_paged_is_the_body(reqs: Reqs, dtype: torch.dtype) -> None:
    Case(latent_spec(), reqs, dtype).check()


@pytest.mark.parametrize("heads", [3, 16, 128])
def test_heads(heads: int) -> None:
    Case(latent_spec(heads), [(37, 1), (20, 3)]).check()


def test_sizes_that_are_no_power_of_two() -> None:
    spec = MLASpec(num_heads=3, rank=24, nope_dim=8, rope_dim=8, v_head_dim=8, scale=0.2)
    Case(spec, BATCHES["mixed"]).check()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES.values(), ids=KV_DTYPES)
def test_pools_of_other_dtypes(kv_dtype: torch.dtype) -> None:
    """Latents and rotated keys have scales of their own."""
    Case(latent_spec(), BATCHES["mixed"], kv_dtype=kv_dtype).check()


def test_a_bucket_is_the_body() -> None:
    Case(latent_spec(), BATCHES["decode"], padding=3).check()


def test_a_long_range_is_split() -> None:
    case = Case(latent_spec(), [(1500, 1)])
    assert attention_plan.plan(case.spec, case.batch, CPU).static.num_parts
    case.check()
