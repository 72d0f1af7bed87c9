"""Attention for Hopper and for Blackwell, in Gluon, against the ops' bodies, through a model of what Gluon means; and where it may be chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from gluon_model import Deadlock, Kernel, Machine, Unordered, launched
from sglang_triton import attention_plan, blackwell_attention, blackwell_kernels, hopper_attention, hopper_kernels
from sglang_triton.gluon_attention import descriptor
from sglang_triton.gluon_limits import ARCHS, BLACKWELL, HOPPER, attention_limits, attention_pool_limits
from sglang_triton.kernels import KERNELS
from triton_attention_cases import Case, Reqs, spec_of
from triton_tolerance import assert_close

from sglang_core.api import DeviceInfo, OpSite, SelectionContext
from sglang_core.api.ops import OPS, AttnSpec, RaggedBatch

# (queries, keys): several blocks and stages again, blocks in part, no query, no key, fewer keys than queries.
LENS: Reqs = [(140, 600), (0, 0), (1, 1), (5, 90), (3, 0), (64, 256), (70, 9)]
SPEC = spec_of(2, 1, 64, causal=False)


@dataclass(frozen=True)
class Own:
    """Kernels of our own, what plans for them, and the barriers that one allocates."""

    launcher: Any
    module: Any
    plan: Callable[..., Any]
    barriers: tuple[str, ...]


BARRIERS = ("k_full", "k_free", "v_full", "v_free")
OWN = {
    HOPPER: Own(hopper_attention, hopper_kernels, attention_plan.plan, ("v_clean", *BARRIERS)),
    BLACKWELL: Own(
        blackwell_attention,
        blackwell_kernels,
        attention_plan.plan_tall,
        (*BARRIERS, "q_full", "s_full", "p_full", "o_full"),
    ),
}
DEAF = [(provider, i + 1) for provider, own in OWN.items() for i in range(len(own.barriers))]


@pytest.fixture(params=OWN)
def provider(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def modelled(provider: str, **model: Any) -> Iterator[Any]:
    """Inside, the module of the provider's kernels, which run as the model runs them."""
    own = OWN[provider]
    with ExitStack() as stack:
        for name in (f"_attend_packed_{provider}", f"_attend_items_{provider}"):
            stack.enter_context(launched(own.launcher, name, Kernel(own.module, getattr(own.module, name), **model)))
        yield own.launcher


def check(
    provider: str, spec: AttnSpec, dtype: torch.dtype = torch.bfloat16, lens: Reqs = LENS, *, padding: int = 0,
    growth: float = 1.0, **model: Any,
) -> None:  # fmt: skip
    """Heads are slices of one projection; rows of no req, which may be read, hold NaN. `growth`: of keys, from the last, which is first met, to the first."""
    torch.manual_seed(0)
    batch = RaggedBatch.of(*zip(*lens, strict=True), torch.device("cpu"))
    tokens, keys = int(batch.cu_q[-1]) + padding, int(batch.cu_k[-1])
    q = torch.randn(tokens, 2 * spec.num_heads, spec.head_dim).to(dtype)[:, : spec.num_heads]
    k, v = (torch.randn(keys + 9, 2 * spec.num_kv_heads, d).to(dtype) for d in (spec.head_dim, spec.v_head_dim))
    k[keys:], v[keys:] = torch.nan, torch.nan
    k[:keys] *= torch.linspace(growth, 1.0, keys)[:, None, None]
    k, v = k[:, spec.num_kv_heads :], v[:, spec.num_kv_heads :]
    want, want_lse = OPS["attn.ragged"].body(q, k[:keys], v[:keys], batch, spec, lse=True)
    with modelled(provider, **model) as kernels:
        got, lse = kernels.ragged(q, k, v, batch, spec, lse=True)
    assert_close(got, want, scale=4.0)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_body(provider: str, causal: bool, dtype: torch.dtype) -> None:
    check(provider, spec_of(4 if causal else 1, 2 if causal else 1, 64, causal=causal), dtype, padding=4)


@pytest.mark.parametrize("dims", [(128, 128), (192, 128), (128, 64)])
def test_dims(provider: str, dims: tuple[int, int]) -> None:
    check(provider, spec_of(2, 1, dims[0], v_head_dim=dims[1]), lens=[(130, 300), (20, 20)])


@pytest.mark.parametrize("seed", range(1, 6))
def test_in_whatever_order_partitions_and_copies_come(provider: str, seed: int) -> None:
    check(provider, SPEC, lens=[(9, 90), (130, 590)], seed=seed)


@pytest.mark.parametrize("growth", [1.0, 30.0])
def test_scores_that_grow_from_block_to_block(provider: str, growth: float) -> None:
    """So that what was summed before decays, again and again; or so little that it need not."""
    check(provider, SPEC, lens=[(130, 590)], growth=growth)


def test_a_row_does_not_depend_on_its_neighbours(provider: str) -> None:
    """The last tokens of a req, and these alone, without tokens whose largest scores grow from block to block: the same bits."""
    torch.manual_seed(0)
    q, k, v = torch.randn(130, 2, 64), torch.randn(590, 1, 64), torch.randn(590, 1, 64)
    q[40:] /= 20
    k *= torch.linspace(30, 1, 590)[:, None, None]
    q, k, v = (x.bfloat16() for x in (q, k, v))

    def attend(q: torch.Tensor) -> torch.Tensor:
        batch = RaggedBatch.of([len(q)], [len(k)], q.device)
        with modelled(provider) as kernels:
            made: torch.Tensor = kernels.ragged(q, k, v, batch, SPEC)
        return made

    assert torch.equal(attend(q)[40:], attend(q[40:]))


@pytest.mark.parametrize("provider, deaf", DEAF, ids=[OWN[name].barriers[i - 1] for name, i in DEAF])
def test_a_barrier_that_nobody_waits_for_shows(provider: str, deaf: int) -> None:
    def all_seeds() -> None:
        for seed in range(12):
            check(provider, SPEC, lens=[(130, 590)], seed=seed, deaf=deaf)

    with pytest.raises(AssertionError):
        all_seeds()


def test_a_missing_fence_shows(provider: str) -> None:
    with pytest.raises(Unordered):
        check(provider, SPEC, lens=[(9, 90)], fences=False)


def test_waiting_for_what_never_comes_is_a_deadlock() -> None:
    machine = Machine(0)
    with pytest.raises(Deadlock):
        machine.run([(lambda: machine.turn(lambda: False), ()), (machine.turn, ())])


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (7, 1), (3, 3)])
def test_heads_that_share_keys(provider: str, heads: int, kv_heads: int) -> None:
    """Groups that are no power of two: some rows of a tile are nobody's."""
    check(provider, spec_of(heads, kv_heads, 64), lens=[(50, 150), (1, 9)])


def over_pool(provider: str, spec: AttnSpec, reqs: Reqs, dtype: torch.dtype = torch.bfloat16, **facts: Any) -> None:
    torch.manual_seed(0)
    case = Case(spec, reqs, dtype, **facts)
    case.plans = (OWN[provider].plan, attention_plan.plan_invariant)
    with modelled(provider) as kernels:
        case.kernel = kernels.paged
        case.check()


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_pages(provider: str, page_size: int) -> None:
    """Under both plans: splits begin in the middle of a req, and pages that no req has hold NaN."""
    over_pool(provider, spec_of(2, 1, 64), [(300, 70), (0, 90), (37, 1)], page_size=page_size)


@pytest.mark.parametrize("facts", [{"causal": False}, {"heads": 7}, {"dim": 128, "v_head_dim": 64}], ids=str)
def test_pools(provider: str, facts: dict[str, Any]) -> None:
    over_pool(provider, spec_of(**{"heads": 2, "kv_heads": 1, "dim": 64} | facts), [(130, 80)], torch.float16)


def test_tokens_of_no_req_in_a_bucket(provider: str) -> None:
    over_pool(provider, spec_of(2, 1, 64), [(20, 66)], padding=3)


def test_no_keys_at_all(provider: str) -> None:
    check(provider, SPEC, lens=[(5, 0)])


def test_rows_that_tma_cannot_copy_are_copied_first() -> None:
    """Of 65 numbers each: no multiple of 16 bytes."""
    x = torch.randn(7, 2, 65).bfloat16()[:, :, :64]
    made, head = descriptor(x, 64, 64)
    assert head == 64 and made.strides == (128, 1)
    torch.testing.assert_close(made.base.view(7, 2, 64), x)


def refused(
    limits: Callable[[SelectionContext, str], str | None] = attention_limits,
    path: str = "cuda/sm_90",
    dtype: str = "bfloat16",
    page: int = 64,
    **facts: Any,
) -> str | None:
    spec = spec_of(**{"heads": 4, "kv_heads": 2, "dim": 128} | facts)
    site = OpSite(op="attn.ragged", layer="LatentAttention", dtype=dtype, spec=spec)
    device = DeviceInfo(backend="cuda", path=path, name="a device")
    return limits(SelectionContext(device=device, site=site, page_size=page), "sm_90")


def test_what_it_takes() -> None:
    assert refused() is None and refused(dim=192, v_head_dim=128) is None
    assert "not cuda/sm_100" in str(refused(path="cuda/sm_100"))
    assert "not float32" in str(refused(dtype="float32"))
    assert "not 256 and 256" in str(refused(dim=256))
    assert "windows" in str(refused(window=9)) and "soft caps" in str(refused(soft_cap=2.0))
    assert "sinks, trees of drafts" in str(refused(has_sinks=True, tree=True))
    assert "not 256" in str(refused(heads=512, kv_heads=2))
    assert "not -1.0" in str(refused(scale=-1.0))
    assert refused(attention_pool_limits, kv_dtype="bfloat16") is None
    assert "they are fp8_e4m3" in str(refused(attention_pool_limits, kv_dtype="fp8_e4m3"))
    assert all(f"not {page}" in str(refused(attention_pool_limits, page=page)) for page in (1, 8, 48))
    assert "windows" in str(refused(attention_pool_limits, window=9))


def test_it_comes_after_every_other_provider() -> None:
    mine = [kernel for kernel in KERNELS if kernel.provider in ARCHS]
    assert {kernel.provider for kernel in mine} == set(ARCHS)
    assert all(kernel.device == ("cuda",) for kernel in mine)
    others = [kernel for kernel in KERNELS if kernel.provider not in ARCHS]
    assert max(kernel.priority for kernel in mine) < min(kernel.priority for kernel in others)
