from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_core.ops import ssm
from sglang_core.ops.ssm import causal_conv1d, chunked_rule, gated_delta_rule, recurrent_rule
from sglang_core.ops.ssm_plan import StatePlan, ssm_plan
from tests.ops.state_case import CPU, StateCase, delta_spec, naive_conv, naive_delta, state_case

LAYER = 1
STEPS: dict[str, list[tuple[bool, int]]] = {
    "decode": [(True, 1), (True, 1), (True, 1)],
    "first tokens": [(False, 1), (False, 1)],
    "prefill": [(False, 9), (False, 130), (False, 64)],
    "chunked prefill": [(True, 65), (True, 63), (True, 2)],
    "mixed": [(True, 1), (False, 70), (True, 1), (True, 129), (False, 1), (True, 3)],
    "nothing new": [(True, 0), (False, 2), (False, 0)],
    "no tokens": [(True, 0), (False, 0)],
}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # bfloat16: half an ulp is 4e-3 of the value


def planned(case: StateCase) -> StatePlan:
    return ssm_plan(case.spec, case.batch, CPU)


def assert_near(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.shape == theirs.shape
    assert float(((ours.double() - theirs).abs() / (1 + theirs.abs())).max() if ours.numel() else 0) < BOUNDS[dtype]


def check_conv(case: StateCase, dtype: torch.dtype, *, bias: bool = True, silu: bool = True) -> None:
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(case.spec.conv_dim, case.spec.conv_width, generator=g).to(dtype)
    b = torch.randn(case.spec.conv_dim, generator=g).to(dtype) if bias else None
    y = causal_conv1d(case.x, weight, b, case.pool, LAYER, planned(case), activation="silu" if silu else None)
    assert y.dtype == dtype
    for r, state in enumerate(case.conv_states):
        expected, last = naive_conv(case.x[case.rows(r)], weight, b, state, silu)
        assert_near(y[case.rows(r)], expected, dtype)
        slot = int(case.batch.write_slots_cpu[r])
        assert torch.equal(case.pool.conv(LAYER)[slot].double(), last)
    assert torch.equal(y[int(case.batch.cu_extend_cpu[-1]) :], torch.zeros_like(y[int(case.batch.cu_extend_cpu[-1]) :]))


def check_delta(case: StateCase, dtype: torch.dtype) -> None:
    o = gated_delta_rule(*case.delta_args, case.pool, LAYER, case.spec, planned(case))
    assert o.dtype == dtype
    for r, state in enumerate(case.states):
        rows = case.rows(r)
        expected, last = naive_delta(case.spec, *(z[rows] for z in case.delta_args), state)
        assert_near(o[rows], expected, dtype)
        assert_near(case.pool.state(LAYER)[int(case.batch.write_slots_cpu[r])], last, torch.float32)
    assert torch.equal(o[int(case.batch.cu_extend_cpu[-1]) :], torch.zeros_like(o[int(case.batch.cu_extend_cpu[-1]) :]))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("step", STEPS)
def test_both_ops_are_what_a_loop_over_tokens_computes(step: str, dtype: torch.dtype) -> None:
    check_conv(state_case(STEPS[step], dtype=dtype), dtype)
    check_delta(state_case(STEPS[step], dtype=dtype), dtype)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_padding_of_a_bucket_changes_nothing(step: str, in_place: bool) -> None:
    """Its tokens are NaN, its reqs write to slot 0 only."""
    padded: dict[str, Any] = {"static": True, "padding": (11, 3), "in_place": in_place}
    check_conv(state_case(STEPS[step], **padded), torch.float32)
    check_delta(state_case(STEPS[step], **padded), torch.float32)


@pytest.mark.parametrize("in_place", [False, True])
def test_only_the_slots_written_change(in_place: bool) -> None:
    case = state_case(STEPS["mixed"], in_place=in_place)
    before = [leaf.clone() for leaf in case.pool.leaves]
    causal_conv1d(case.x, torch.randn(case.spec.conv_dim, 4), None, case.pool, LAYER, planned(case))
    gated_delta_rule(*case.delta_args, case.pool, LAYER, case.spec, planned(case))
    written = set(case.batch.write_slots_cpu.tolist())
    for i, (old, new) in enumerate(zip(before, case.pool.leaves, strict=True)):
        for slot in range(case.pool.num_slots):
            same = torch.equal(old[slot].nan_to_num(7.0), new[slot].nan_to_num(7.0))
            assert same is (i < 2 * LAYER or slot not in written)


def test_a_step_run_twice_gives_the_same_bits() -> None:
    case, plan = (c := state_case(STEPS["mixed"])), planned(c)
    first, again = (gated_delta_rule(*case.delta_args, case.pool, LAYER, case.spec, plan) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_k_heads": 4},
        {"num_k_heads": 1, "num_v_heads": 6},
        {"qk_l2norm": False, "scale": 0.01},
        {"k_head_dim": 5, "v_head_dim": 16},
        {"conv_width": 2},
        {"conv_width": 7},
    ],
)
def test_other_shapes(changes: dict[str, Any]) -> None:
    spec = delta_spec(**changes)
    check_conv(state_case(STEPS["chunked prefill"], spec=spec), torch.float32, bias=False, silu=False)
    case = state_case([(True, 12), (True, 1), (False, 5)], spec=spec)
    if not spec.qk_l2norm:  # keys of any length: no longer a contraction, so a short chunk of small ones
        case.k = case.k * 0.2
    check_delta(case, torch.float32)


def test_reqs_are_taken_in_blocks_that_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssm, "BLOCK_ELEMENTS", 2 * 4 * 64 * 64)  # two reqs in the chunked form
    check_delta(state_case(STEPS["mixed"]), torch.float32)
    monkeypatch.setattr(ssm, "BLOCK_ELEMENTS", 1)
    check_delta(state_case(STEPS["mixed"]), torch.float32)


def rule_inputs(length: int, *, decay: float, beta: float, aligned: bool) -> tuple[Tensor, ...]:
    """float64, of unit keys. Aligned keys: every token overwrites what the one before it wrote."""
    g = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, length, 2, 8, generator=g, dtype=torch.float64) for _ in range(2))
    k = k[:, :1].expand(k.shape) if aligned else k
    k = k / k.norm(dim=-1, keepdim=True)
    v = torch.randn(2, length, 4, 6, generator=g, dtype=torch.float64)
    ones = torch.ones(2, length, 4, dtype=torch.float64)
    state = torch.randn(2, 4, 8, 6, generator=g, dtype=torch.float64)
    return q, k, v, -decay * ones, beta * ones, state


@pytest.mark.parametrize("decay", [0.0, 0.01, 3.0, 200.0, math.inf])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("aligned", [False, True])
def test_the_two_forms_agree(decay: float, beta: float, aligned: bool) -> None:
    """At the corners as well: no decay, all of it (its products overflow where they are not masked), nothing or all replaced."""
    inputs = rule_inputs(ssm.CHUNK, decay=decay, beta=beta, aligned=aligned)
    for ours, theirs in zip(chunked_rule(*inputs), recurrent_rule(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    narrow = chunked_rule(*(x.float() for x in inputs))
    for ours, theirs in zip(narrow, recurrent_rule(*inputs), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


def test_decoding_token_by_token_is_prefill() -> None:
    """The op's recurrent form, a step a token, ends where its chunked form does."""
    whole = state_case([(True, 90)])
    o = gated_delta_rule(*whole.delta_args, whole.pool, LAYER, whole.spec, planned(whole))
    slots = whole.batch.read_slots_cpu
    step = state_case([(True, 1)], in_place=True)
    step.pool, step.batch.read_slots_cpu[:], step.batch.write_slots_cpu[:] = whole.pool, slots, slots
    plan = planned(step)
    parts = [
        gated_delta_rule(*(z[t : t + 1] for z in whole.delta_args), whole.pool, LAYER, whole.spec, plan)
        for t in range(90)
    ]
    torch.testing.assert_close(torch.cat(parts), o, rtol=1e-4, atol=1e-5)
    state = whole.pool.state(LAYER)
    torch.testing.assert_close(state[slots], state[whole.batch.write_slots_cpu], rtol=1e-4, atol=1e-5)


def test_the_form_of_a_req_does_not_depend_on_its_neighbours() -> None:
    """A decode beside a long prefill gives the bits that it gives alone."""
    alone, beside = state_case([(True, 1)]), state_case([(True, 1), (False, 100)])
    for name in ("q", "k", "v", "g", "beta"):
        getattr(beside, name)[:1] = getattr(alone, name)
    read = beside.batch.read_slots_cpu[:1]
    beside.pool.state(LAYER)[read] = alone.pool.state(LAYER)[alone.batch.read_slots_cpu]
    o_alone = gated_delta_rule(*alone.delta_args, alone.pool, LAYER, alone.spec, planned(alone))
    o_beside = gated_delta_rule(*beside.delta_args, beside.pool, LAYER, beside.spec, planned(beside))
    assert torch.equal(o_beside[:1], o_alone)


def test_a_plan_lists_who_reaches_into_each_chunk() -> None:
    plan = planned(state_case([(True, 1), (False, 70), (True, 1), (True, 129), (False, 1), (True, 3)]))
    assert plan.order.tolist() == [3, 1, 5, 0, 2, 4]
    assert plan.static.active == (3, 2, 1)
    assert planned(state_case(STEPS["decode"])).static.active == ()


def test_plans_of_a_bucket_are_alike_and_can_be_refilled() -> None:
    """Of T tokens, only so many reqs can reach into a chunk."""
    first = state_case([(True, 100), (False, 3)], static=True, padding=(25, 6))
    other = state_case([(True, 2), (False, 100), (True, 1)], static=True, padding=(25, 5))
    plan, new = planned(first), planned(other)
    assert plan.static == new.static
    assert plan.static.active == (8, 1)
    assert ssm_plan(other.spec, other.batch, CPU, plan) is plan
    assert all(torch.equal(a, b) for a, b in zip(plan.buffers(), new.buffers(), strict=True))
    with pytest.raises(AssertionError, match="another bucket"):
        ssm_plan(other.spec, state_case(STEPS["decode"]).batch, CPU, plan)


@pytest.mark.parametrize("changes", [{"num_v_heads": 3}, {"conv_width": 1}])
def test_shapes_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        delta_spec(**changes)
