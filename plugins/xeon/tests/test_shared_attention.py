"""Keys that several reqs share: found by the plan, visited once by the kernel."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from attention_cases import CPU, DTYPES, Case, make_spec
from sglang_xeon import attention, attention_plan
from sglang_xeon.attention_plan import XeonPlan
from sglang_xeon.step_graph import LEAST_KERNELS, RECORD_AT, StepGraphs
from test_latent_attention import LatentCase
from test_latent_attention import make_spec as make_latent_spec
from torch import Tensor

# Reqs of (prefix, extend), and which of them share how many pages of 16.
BATCHES = {
    "all_alike": ([(300, 1)] * 9, [(range(9), 18)]),
    "own_lengths": ([(160, 1), (420, 1), (161, 1), (1300, 1)], [(range(4), 10)]),
    "two_groups_and_others": (
        [(200, 1), (170, 1), (210, 1), (500, 1), (180, 1), (0, 1), (190, 1)],
        [((0, 2, 4), 11), ((1, 3, 6), 10)],
    ),
    "a_tree": ([(600, 1)] * 7, [(range(7), 9), ((1, 3, 5, 6), 20), ((3, 6), 34)]),
    "only_deeper_ones_are_long": ([(400, 1)] * 5, [(range(5), 3), ((0, 4), 14), ((1, 2, 3), 20)]),
    "more_rows_than_a_tile": ([(140, 1)] * 50, [(range(50), 8)]),
    "mixed": (
        [(300, 1), (300, 5), (300, 60), (300, 1), (0, 40), (310, 3)],
        [(range(4), 18), ((0, 5), 18)],
    ),
}
A_FEW = [BATCHES[name] for name in ("two_groups_and_others", "a_tree", "mixed")]
KV_DTYPES = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def runs_of(case: Case) -> dict[tuple[int, int], int]:
    """Pages that two reqs have in common which are neighbours in the plan's order; the lower req first."""
    order, pages = case.plan(case.spec, case.batch, CPU).sharing.tolist()
    return {(min(a, b), max(a, b)): n for a, b, n in zip(order, order[1:], pages[1:], strict=False) if n}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reqs, shared", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (3, 3, 12)])
def test_shared_keys_are_the_body(level: str, dtype: torch.dtype, reqs, shared, heads, kv_heads, dim) -> None:
    case = Case(make_spec(heads, kv_heads, dim), reqs, dtype, page_size=16, shared=shared)
    assert runs_of(case)
    case.check()


@pytest.mark.parametrize("facts", [{"soft_cap": 2.0}, {"window": 170}, {"causal": False}, {"has_sinks": True}])
def test_windows_caps_sinks_and_full_attention(level: str, facts: dict) -> None:
    for reqs, shared in A_FEW:
        case = Case(make_spec(**facts), reqs, torch.bfloat16, page_size=16, shared=shared)
        case.check(**{"sinks": torch.randn(4)} if facts.get("has_sinks") else {})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES.values(), ids=KV_DTYPES)
def test_shared_codes(level: str, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    for reqs, shared in A_FEW:
        Case(make_spec(6, 2, 80), reqs, dtype, page_size=16, kv_dtype=kv_dtype, shared=shared).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_dtype", [(1, None), *((16, kv) for kv in (None, *KV_DTYPES.values()))])
def test_shared_latents(level: str, dtype: torch.dtype, heads: int, kv_dtype: torch.dtype | None) -> None:
    for reqs, shared in A_FEW:
        case = LatentCase(make_latent_spec(heads), reqs, dtype, page_size=16, kv_dtype=kv_dtype, shared=shared)
        assert runs_of(case)
        case.check()


def test_trees_over_shared_keys(level: str) -> None:
    reqs, shared = [(300, 7), (300, 4), (260, 1), (300, 9)], [(range(4), 16)]
    trees = [[(i - 1) // 2 if i else -1 for i in range(n)] for _, n in reqs]
    case = Case(make_spec(tree=True), reqs, torch.bfloat16, page_size=16, trees=trees, shared=shared)
    assert runs_of(case)
    case.check()


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_any_number_of_threads(level: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for reqs, shared in ([(1100, 1)] * 3, [(range(3), 66)]), *A_FEW:
            Case(make_spec(), reqs, torch.float32, page_size=16, shared=shared).check()
    finally:
        torch.set_num_threads(before)


def test_the_plan_finds_what_reqs_share() -> None:
    reqs, shared = BATCHES["two_groups_and_others"]
    runs = runs_of(Case(make_spec(), reqs, torch.float32, page_size=16, shared=shared))
    assert sorted(runs.values()) == [10, 10, 11, 11]
    assert all(set(pair) < {0, 2, 4} for pair, n in runs.items() if n == 11)
    assert all(set(pair) < {1, 3, 6} for pair, n in runs.items() if n == 10)


def test_what_is_short_or_written_or_long_of_its_own_is_not_shared() -> None:
    def runs(reqs, pages: int, **facts) -> dict:
        return runs_of(Case(make_spec(**facts), reqs, torch.float32, page_size=16, shared=[(range(len(reqs)), pages)]))

    assert runs([(128, 1), (128, 1)], 8) == {(0, 1): 8}
    assert not runs([(127, 1), (127, 1)], 7)
    assert not runs([(128, 1)], 8)
    assert not runs([(128, 25), (128, 25)], 8)  # 50 rows a KV head
    assert not runs([(400, 1), (400, 1)], 20, window=300)
    assert not runs([(400, 1), (400, 1)], 20, causal=False)
    # A table that names the page of a req's own last tokens too: it shares only what is whole before the step.
    case = Case(make_spec(), [(143, 1), (143, 1)], torch.float32, page_size=16, shared=[(range(2), 8)])
    case.batch.page_table_cpu[1] = case.batch.page_table_cpu[0]
    assert runs_of(case) == {(0, 1): 8}


def test_padding_shares_nothing() -> None:
    case = Case(make_spec(), [(200, 1)] * 4, torch.float32, page_size=16, shared=[(range(4), 10)])
    b = case.batch
    b.seq_lens_cpu[2:] = 0  # reqs that fill a bucket, whatever else is said of them
    assert runs_of(case) == {(0, 1): 10}


def test_every_req_is_in_the_order_once() -> None:
    for reqs, shared in BATCHES.values():
        case = Case(make_spec(), reqs, torch.float32, page_size=16, shared=shared)
        assert sorted(case.plan(case.spec, case.batch, CPU).sharing[0].tolist()) == list(range(len(reqs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_invariant_plan_gives_a_req_the_bits_it_has_alone(level: str, dtype: torch.dtype) -> None:
    case = Case(make_spec(), [(700, 1)] * 3, dtype, page_size=16, shared=[(range(3), 40)])
    b, spec = case.batch, case.spec
    whole = attention.paged(*case.new, case.pool, 1, spec, attention_plan.plan_invariant(spec, b, CPU))
    one = slice(1, 2)
    alone = dataclasses.replace(
        b,
        cu_extend_cpu=torch.tensor([0, 1], dtype=torch.int32),
        prefix_lens_cpu=b.prefix_lens_cpu[one],
        seq_lens_cpu=b.seq_lens_cpu[one],
        page_table_cpu=b.page_table_cpu[one],
        slot_mapping_cpu=b.slot_mapping_cpu[one],
        num_tokens=1,
        num_reqs=1,
    )
    plan = attention_plan.plan_invariant(spec, alone, CPU)
    assert torch.equal(attention.paged(case.q[one], None, None, case.pool, 1, spec, plan), whole[one])


@dataclass(kw_only=True, slots=True)
class Step:
    q: Tensor
    plan: XeonPlan


def test_a_replayed_step_shares_what_its_own_reqs_share() -> None:
    """Who shares what is no part of a recorded shape."""
    spec = make_spec()
    case = Case(spec, [(300, 1)] * 4, torch.bfloat16, page_size=16)
    for leaf in case.pool.leaves:
        leaf.normal_()
    calls = 0

    def step(batch: Step) -> tuple[Tensor]:
        nonlocal calls
        calls += 1
        o = batch.q
        with torch.inference_mode():
            for _ in range(LEAST_KERNELS):
                o = attention.paged(o, None, None, case.pool, 1, spec, batch.plan)
        return (o,)

    steps = []
    for shared in ([], [(range(4), 18)], [((0, 2), 9), ((1, 3), 17)]):
        table = case.batch.page_table_cpu.clone()
        for members, count in shared:
            table[list(members), :count] = table[members[0], :count].clone()
        plan = attention_plan.plan(spec, dataclasses.replace(case.batch, page_table_cpu=table), CPU)
        steps.append(Step(q=torch.randn(4, 4, 64).bfloat16(), plan=plan))
    graphs = StepGraphs(step)
    for i in range(RECORD_AT + 5):
        assert torch.equal(graphs(steps[i % 3])[0], step(steps[i % 3])[0])
    assert calls == (RECORD_AT + 5) + RECORD_AT + 1  # of them all without graphs, and of the first with them
