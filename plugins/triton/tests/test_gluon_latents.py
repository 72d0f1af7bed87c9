"""Attention over latents for Hopper and for Blackwell, in Gluon, against the op's body, through a model of what Gluon means; and where it may be chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from gluon_model import Kernel, Unordered
from sglang_triton import (
    attention_plan,
    blackwell_latent_kernels,
    blackwell_latents,
    hopper_latent_kernels,
    hopper_latents,
)
from sglang_triton.gluon_latents import paged
from sglang_triton.gluon_limits import ARCHS, BLACKWELL, HOPPER, latent_limits
from triton_attention_cases import CPU, Case, Reqs

from sglang_core.api import DeviceInfo, OpSite, SelectionContext
from sglang_core.api.ops import MLASpec


@dataclass(frozen=True)
class Own:
    """A kernel of our own, what plans for it, and the barriers that it allocates."""

    launcher: Any
    module: Any
    plan: Callable[..., Any]
    barriers: tuple[str, ...]


OWN = {
    HOPPER: Own(hopper_latents, hopper_latent_kernels, attention_plan.plan, ("full", "free", "p_full", "p_free")),
    BLACKWELL: Own(
        blackwell_latents,
        blackwell_latent_kernels,
        attention_plan.plan_latents_tall,
        ("own_full", "own_free", "rest_full", "rest_free", "q_full", "s_full", "s_free", "p_full", "p_free"),
    ),
}
DEAF = [(provider, i + 1) for provider, own in OWN.items() for i in range(len(own.barriers))]
SHORT: Reqs = [(250, 1)]  # more blocks than there are stages, the last one in part


@pytest.fixture(params=OWN)
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def latent_spec(heads: int = 64, **facts: Any) -> MLASpec:
    sizes = {"rank": 512, "nope_dim": 16, "rope_dim": 64, "v_head_dim": 16, "scale": 0.05}
    return MLASpec(num_heads=heads, **(sizes | facts))


def grow(case: Case, growth: float) -> None:
    """Rotated keys of the first req, which are no values, from the last one to the first."""
    size, prefix = case.batch.page_size, int(case.batch.prefix_lens_cpu[0])
    pages = case.batch.page_table_cpu[0].long()[: -(-prefix // size)]
    slots = (pages[:, None] * size + torch.arange(size)).flatten()[:prefix]
    rotated = case.pool.layer_leaves(1)[1].flatten(0, 1)
    rotated[slots] *= torch.linspace(growth, 1.0, prefix)[:, None, None].to(rotated.dtype)


def check(
    provider: str, reqs: Reqs, heads: int = 64, dtype: torch.dtype = torch.bfloat16, *, page_size: int = 64, padding: int = 0,
    growth: float = 1.0, **model: Any,
) -> None:  # fmt: skip
    """Under both plans; slots that nobody wrote hold NaN. `growth`: of rotated keys, from the first req's last token, which is first met, to its first."""
    torch.manual_seed(0)
    own = OWN[provider]
    case = Case(latent_spec(heads), reqs, dtype, page_size=page_size, padding=padding)
    grow(case, growth)
    case.plans = (own.plan, attention_plan.plan_invariant)
    name = f"_attend_latents_{provider}"
    kernel = Kernel(own.module, getattr(own.module, name), **model)
    case.kernel = partial(paged, kernel, own.launcher.FORM)
    case.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_the_body(provider: str, dtype: torch.dtype) -> None:
    """Whole blocks, blocks in part, a req's first token, several tokens of a req."""
    check(provider, [(63, 1), (250, 1), (0, 1), (40, 3)], dtype=dtype)


@pytest.mark.parametrize("heads", [200, 128, 100, 20])
def test_heads(provider: str, heads: int) -> None:
    """Tiles that are not full, or more than one a token; several tokens of few heads in one, under a causal mask."""
    check(provider, [(70, 5), (9, 1)], heads)


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_pages(provider: str, page_size: int) -> None:
    check(provider, [(150, 1), (31, 2)], page_size=page_size)


def test_a_bucket_with_tokens_of_no_req(provider: str) -> None:
    """And with room for more items than there are: their programs do nothing."""
    check(provider, [(100, 1), (30, 1)], padding=3)


def test_a_long_range_is_split(provider: str) -> None:
    reqs = [(2200, 1), (100, 1)]
    case = Case(latent_spec(), reqs, torch.bfloat16, page_size=64)
    assert OWN[provider].plan(case.spec, case.batch, CPU).static.num_parts
    check(provider, reqs)


@pytest.mark.parametrize("growth", [100.0, 0.01])
def test_scores_that_grow_from_block_to_block(provider: str, growth: float) -> None:
    """So that what was summed before decays, again and again; or not at all."""
    check(provider, [(590, 1)], growth=growth)


@pytest.mark.parametrize("seed", range(1, 6))
def test_in_whatever_order_partitions_and_copies_come(provider: str, seed: int) -> None:
    check(provider, SHORT, seed=seed)


@pytest.mark.parametrize("provider, deaf", DEAF, ids=[f"{name}-{OWN[name].barriers[i - 1]}" for name, i in DEAF])
def test_a_barrier_that_nobody_waits_for_shows(provider: str, deaf: int) -> None:
    def all_seeds() -> None:
        for seed in range(12):
            check(provider, SHORT, seed=seed, deaf=deaf)

    with pytest.raises(AssertionError):
        all_seeds()


def test_a_missing_fence_shows(provider: str) -> None:
    with pytest.raises(Unordered):
        check(provider, SHORT, fences=False)


def test_what_it_takes(provider: str) -> None:
    arch = ARCHS[provider]

    def refused(path: str = f"cuda/{arch}", dtype: str = "bfloat16", page: int = 64, **facts: Any) -> str | None:
        site = OpSite(op="attn.mla_paged", layer="LatentAttention", dtype=dtype, spec=latent_spec(**facts))
        device = DeviceInfo(backend="cuda", path=path, name="a device")
        return latent_limits(SelectionContext(device=device, site=site, page_size=page), arch)

    assert refused() is None and refused(heads=16, dtype="float16", page=16) is None
    assert "not cuda/sm_120" in str(refused(path="cuda/sm_120"))
    assert "not float32" in str(refused(dtype="float32"))
    assert "not 256 and 64" in str(refused(rank=256)) and "not 512 and 32" in str(refused(rope_dim=32))
    assert "trees" in str(refused(tree=True)) and "not -1.0" in str(refused(scale=-1.0))
    assert "they are fp8_e4m3" in str(refused(kv_dtype="fp8_e4m3"))
    assert "not 8" in str(refused(page=8))
