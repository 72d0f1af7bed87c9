"""Latent attention: the absorbed op against the plainest form, and the plan that divides a step by path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.ops import mla
from sglang_core.ops.mla import (
    ExpandPlan,
    MLAPlan,
    MLASpec,
    attn_mla_paged,
    attn_mla_plan,
    attn_mla_project,
    is_expanded,
    kv_write_mla,
    plan_mla,
)
from tests.ops.mla_case import SPEC, MLACase, mla_case, naive_mla
from tests.ops.paged_case import CPU

STEPS = {
    "decode": [(9, 1), (0, 1), (300, 1)],
    "prefill": [(0, 20), (0, 1), (0, 150)],
    "chunk": [(5, 7), (270, 30)],
    "mixed": [(9, 1), (0, 20), (31, 3), (2, 40)],
}


def run(case: MLACase, **more: bool) -> tuple[Tensor, Tensor]:
    plan = attn_mla_plan(case.spec, case.batch, CPU)
    new = (None, None) if more.get("written") else (case.c_kv, case.k_pe)
    result = attn_mla_paged(case.q_nope, case.q_pe, *new, case.pool, 0, case.spec, plan, lse=True)
    assert isinstance(result, tuple)
    return result


@pytest.mark.parametrize("step", STEPS)
def test_absorbed_is_attention_over_latents(step: str) -> None:
    case = mla_case(STEPS[step])
    o, lse = run(case)
    want, want_lse = naive_mla(case)
    torch.testing.assert_close(o.double(), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=1e-4)


def test_it_writes_latents_and_nothing_else() -> None:
    case = mla_case([(9, 3), (0, 6)])
    before = [leaf.clone() for leaf in case.pool.leaves]
    run(case)
    slots = case.batch.slot_mapping_cpu
    c_kv, k_pe = case.pool.gather(0, slots)
    assert torch.equal(c_kv[:, 0], case.c_kv) and torch.equal(k_pe[:, 0], case.k_pe)
    for old, leaf in zip(before, case.pool.leaves, strict=True):
        kept = torch.ones(leaf.shape[0] * leaf.shape[1], dtype=torch.bool)
        kept[slots.long()] = False
        assert torch.equal(old.flatten(0, 1)[kept].nan_to_num(7), leaf.flatten(0, 1)[kept].nan_to_num(7))


def test_latents_may_be_in_the_pool_already() -> None:
    first, second = mla_case(STEPS["mixed"]), mla_case(STEPS["mixed"])
    kv_write_mla(second.c_kv, second.k_pe, second.pool, 0, second.batch.slot_mapping_cpu)
    assert all(map(torch.equal, run(first), run(second, written=True)))


def test_a_padded_step_gives_the_same_and_zeros() -> None:
    exact = mla_case(STEPS["mixed"])
    padded = mla_case(STEPS["mixed"], static=True, num_tokens=70, num_reqs=6, max_extend=48, num_pages=12)
    o, lse = run(exact)
    padded_o, padded_lse = run(padded)
    n = exact.batch.num_tokens
    want, want_lse = naive_mla(padded)
    torch.testing.assert_close(padded_o.double(), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(padded_lse[:n].double(), want_lse[:n], atol=2e-5, rtol=1e-4)
    assert o.shape[0] == n and not padded_o[n:].any() and padded_lse[n:].isneginf().all()
    assert lse.dtype == torch.float32


def test_projection_is_a_matrix_a_head() -> None:
    x, w = torch.randn(5, 4, 6), torch.randn(4, 6, 12)
    torch.testing.assert_close(attn_mla_project(x, w), torch.einsum("thi,hio->tho", x, w))


def divided(reqs: list[tuple[int, int]], spec: MLASpec = SPEC, **more: bool) -> list[bool]:
    return is_expanded(spec, mla_case(reqs, spec=spec, **more).batch).tolist()


def test_decodes_are_absorbed_and_fresh_prompts_expanded() -> None:
    assert divided([(9, 1), (0, 1), (0, 2), (0, 50)]) == [False, False, True, True]


def test_a_long_prefix_is_expanded_only_for_many_queries() -> None:
    """At SPEC's sizes a cached token costs 12 * 14, and a query and key save 10: about 17 queries pay."""
    assert divided([(400, 15), (400, 18)]) == [False, True]


def test_nothing_is_expanded_in_a_bucket_or_where_it_saves_nothing() -> None:
    assert divided([(0, 50)], static=True) == [False]
    assert divided([(0, 50)], replace(SPEC, rank=7)) == [False]


def test_the_path_of_a_req_does_not_depend_on_its_neighbours() -> None:
    reqs = [(9, 1), (0, 20), (400, 18), (31, 3)]
    assert divided(reqs) == [divided([req])[0] for req in reqs]


def test_a_step_of_one_kind_is_not_divided() -> None:
    plan = plan_mla(SPEC, mla_case([(0, 20), (0, 3)]).batch, CPU)
    assert plan.absorbed is None and plan.expanded is not None and plan.expanded.tokens is None
    plan = plan_mla(SPEC, mla_case([(4, 1)]).batch, CPU)
    assert plan.expanded is None and plan.absorbed is not None and plan.absorbed_tokens is None


def test_every_token_takes_one_path(monkeypatch: pytest.MonkeyPatch) -> None:
    case = mla_case([(9, 1), (0, 20), (31, 3), (2, 40)])
    plan = plan_mla(SPEC, case.batch, CPU)
    assert plan.absorbed is not None and plan.absorbed_tokens is not None and plan.expanded is not None
    assert plan.expanded.tokens is not None
    assert plan.absorbed_tokens.tolist() == [0, *range(21, 24)]
    assert sorted([*plan.absorbed_tokens.tolist(), *plan.expanded.tokens.tolist()]) == list(range(64))
    assert torch.equal(plan.slot_mapping, case.batch.slot_mapping_cpu)


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_chunks_hold_every_cached_token_once_and_no_more_than_asked(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(mla, "KEYS_PER_CHUNK", size)
    monkeypatch.setattr(mla, "EXPANDED_ELEMENTS", 0)
    prefixes = [0, 9, 16, 0, 3, 0]
    case = mla_case([(p, 60) for p in prefixes])
    plan = expanded_plan(plan_mla(SPEC, case.batch, CPU))
    assert all(len(c.slots) <= size for c in plan.chunks)
    table, page_size = case.batch.page_table_cpu, case.batch.page_size
    seen: dict[int, list[int]] = {r: [] for r in range(len(prefixes))}
    for chunk in plan.chunks:
        first = chunk.rows[0] // 60
        assert chunk.batch.cu_q.tolist() == list(range(0, chunk.rows[1] - chunk.rows[0] + 1, 60))
        for i, (a, b) in enumerate(zip(chunk.batch.cu_k.tolist(), chunk.batch.cu_k.tolist()[1:], strict=False)):
            seen[first + i] += chunk.slots[a:b].tolist()
            assert b - a <= chunk.batch.max_k
    for r, prefix in enumerate(prefixes):
        want = [int(table[r, p // page_size]) * page_size + p % page_size for p in range(prefix)]
        assert seen[r] == want


def expanded_plan(plan: MLAPlan) -> ExpandPlan:
    assert plan.expanded is not None
    return plan.expanded


def latent_pool(**changes: object) -> Pool:
    spec = PoolSpec(
        kind="mla", num_layers=2, page_size=4, num_kv_heads=1, head_dim=12, v_head_dim=4, dtype=torch.float32
    )
    return Pool(replace(spec, **changes), 5, CPU)  # type: ignore[arg-type]


def test_a_pool_of_latents_stores_moves_and_exports_them() -> None:
    pool = latent_pool()
    pool.poison(range(5))
    assert pool.c_kv(1).shape == (5, 4, 1, 12) and pool.k_pe(1).shape == (5, 4, 1, 4)
    assert pool.spec.bytes_per_token == 2 * 16 * 4
    c_kv, k_pe = torch.randn(3, 12), torch.randn(3, 4)
    kv_write_mla(c_kv, k_pe, pool, 1, torch.tensor([5, 17, 6], dtype=torch.int32))
    pool.move(torch.tensor([17], dtype=torch.int32), torch.tensor([9], dtype=torch.int32))
    got_c, got_pe = pool.gather(1, torch.tensor([9, 6], dtype=torch.int32))
    assert torch.equal(got_c[:, 0], c_kv[[1, 2]]) and torch.equal(got_pe[:, 0], k_pe[[1, 2]])
    other = latent_pool()
    other.poison(range(5))
    pages = torch.tensor([1], dtype=torch.int32)
    other.import_pages(1, torch.tensor([3], dtype=torch.int32), *pool.export_pages(1, pages))
    assert torch.equal(other.gather(1, torch.tensor([13], dtype=torch.int32))[0][0, 0], c_kv[0])
    assert pool.gather(0, torch.tensor([5], dtype=torch.int32))[0].isnan().all()
    assert pool.fingerprint == other.fingerprint != latent_pool(kind="full").fingerprint


def test_a_pool_of_keys_and_values_has_no_latents() -> None:
    with pytest.raises(AssertionError):
        latent_pool(kind="full").c_kv(0)
    with pytest.raises(AssertionError):
        latent_pool(num_kv_heads=2)
