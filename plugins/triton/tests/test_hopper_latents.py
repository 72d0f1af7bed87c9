"""Attention over latents for Hopper, in Gluon, against the op's body, through a model of what Gluon means; and where it may be chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gluon_model import Kernel, Unordered, launched
from sglang_triton import attention_plan, hopper_latent_kernels, hopper_latents
from sglang_triton.gluon_limits import latent_limits
from triton_attention_cases import CPU, Case, Reqs

from sglang_core.api import DeviceInfo, OpSite, SelectionContext
from sglang_core.api.ops import MLASpec

BARRIERS = ("full", "free", "p_full", "p_free")
SHORT: Reqs = [(250, 1)]  # more blocks than there are stages, the last one in part


def latent_spec(heads: int = 64, **facts: Any) -> MLASpec:
    sizes = {"rank": 512, "nope_dim": 16, "rope_dim": 64, "v_head_dim": 16, "scale": 0.05}
    return MLASpec(num_heads=heads, **(sizes | facts))


def check(reqs: Reqs, heads: int = 64, dtype: torch.dtype = torch.bfloat16, *, page_size: int = 64, padding: int = 0, **model: Any) -> None:  # fmt: skip
    """Under both plans; slots that nobody wrote hold NaN."""
    torch.manual_seed(0)
    case = Case(latent_spec(heads), reqs, dtype, page_size=page_size, padding=padding)
    case.kernel = hopper_latents.mla_paged
    kernel = Kernel(hopper_latent_kernels, hopper_latent_kernels._attend_latents_hopper, **model)
    with launched(hopper_latents, "_attend_latents_hopper", kernel):
        case.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_the_body(dtype: torch.dtype) -> None:
    """Whole blocks, blocks in part, a req's first token, several tokens of a req."""
    check([(63, 1), (250, 1), (0, 1), (40, 3)], dtype=dtype)


@pytest.mark.parametrize("heads", [128, 100, 20])
def test_heads(heads: int) -> None:
    """Two programs a token, one of them not full; several tokens of few heads in one tile, under a causal mask."""
    check([(70, 5), (9, 1)], heads)


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_pages(page_size: int) -> None:
    check([(150, 1), (31, 2)], page_size=page_size)


def test_a_bucket_with_tokens_of_no_req() -> None:
    """And with room for more items than there are: their programs do nothing."""
    check([(100, 1), (30, 1)], padding=3)


def test_a_long_range_is_split() -> None:
    case = Case(latent_spec(), [(2200, 1)], torch.bfloat16, page_size=64)
    assert attention_plan.plan(case.spec, case.batch, CPU).static.num_parts
    check([(2200, 1)])


@pytest.mark.parametrize("seed", range(1, 6))
def test_in_whatever_order_partitions_and_copies_come(seed: int) -> None:
    check(SHORT, seed=seed)


@pytest.mark.parametrize("deaf", range(1, 1 + len(BARRIERS)), ids=BARRIERS)
def test_a_barrier_that_nobody_waits_for_shows(deaf: int) -> None:
    def all_seeds() -> None:
        for seed in range(12):
            check(SHORT, seed=seed, deaf=deaf)

    with pytest.raises(AssertionError):
        all_seeds()


def test_a_missing_fence_shows() -> None:
    with pytest.raises(Unordered):
        check(SHORT, fences=False)


def refused(path: str = "cuda/sm_90", dtype: str = "bfloat16", page: int = 64, **facts: Any) -> str | None:
    site = OpSite(op="attn.mla_paged", layer="LatentAttention", dtype=dtype, spec=latent_spec(**facts))
    device = DeviceInfo(backend="cuda", path=path, name="a device")
    return latent_limits(SelectionContext(device=device, site=site, page_size=page), "sm_90")


def test_what_it_takes() -> None:
    assert refused() is None and refused(heads=16, dtype="float16", page=16) is None
    assert "not cuda/sm_100" in str(refused(path="cuda/sm_100"))
    assert "not float32" in str(refused(dtype="float32"))
    assert "not 256 and 64" in str(refused(rank=256)) and "not 512 and 32" in str(refused(rope_dim=32))
    assert "trees" in str(refused(tree=True)) and "not -1.0" in str(refused(scale=-1.0))
    assert "they are fp8_e4m3" in str(refused(kv_dtype="fp8_e4m3"))
    assert "not 8" in str(refused(page=8))
