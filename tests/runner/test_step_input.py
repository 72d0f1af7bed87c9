"""A plan laid out as arrays, checked against a loop that does the same one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_core.backend.interface import Bucket
from sglang_core.runner.slot_table import SlotTable
from sglang_core.runner.step_input import build_step_input, padding_input
from sglang_core.types import FULL, SamplingParams, SlotInit, StepPlan


def plan_of(reqs: list[tuple[int, int]], page_size: int) -> StepPlan:
    """reqs: (prefix, extend) each; pages are 1, 2, 3, ... in order; the second req's ids are on the device."""
    pages, used = [], 1
    for prefix, extend in reqs:
        count = -(-(prefix + extend) // page_size)
        pages.append(list(range(used, used + count)))
        used += count
    token_ids = [100 * i + j for i, (_, extend) in enumerate(reqs) for j in range(extend)]
    if len(reqs) > 1:
        first = reqs[0][1]
        token_ids[first : first + reqs[1][1]] = [-1] * reqs[1][1]
    return StepPlan(
        step=0,
        mode="mixed",
        slots=list(range(len(reqs)))[::-1],
        prefix_lens=[prefix for prefix, _ in reqs],
        extend_lens=[extend for _, extend in reqs],
        token_ids=token_ids,
        sample=[True] * len(reqs),
        page_starts={FULL: [0] * len(reqs)},
        new_pages={FULL: pages},
    )


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=5),
    st.integers(1, 4),
    st.booleans(),
)
def test_layout_is_that_of_a_plain_loop(reqs: list[tuple[int, int]], page_size: int, padded: bool) -> None:
    table = SlotTable(max_running=5, max_pages_per_req=16, vocab_size=1000)
    plan = plan_of(reqs, page_size)
    table.apply(plan)
    buckets = [Bucket(num_tokens=32, num_reqs=6, max_extend=8, num_pages=16)] if padded else []
    step = build_step_input(plan, table, page_size, buckets)

    token = 0
    for r, (prefix, extend) in enumerate(reqs):
        pages = plan.new_pages[FULL][r]
        assert step.page_table[FULL][r, : len(pages)].tolist() == pages
        assert step.cu_extend[r] == token
        for position in range(prefix, prefix + extend):
            slot = pages[position // page_size] * page_size + position % page_size
            assert step.positions[token] == position
            assert step.slot_mapping[FULL][token] == slot
            known = plan.token_ids[token]
            assert step.token_ids[token] == max(known, 0)
            if step.token_slots is not None:
                assert step.token_slots[token] == (plan.slots[r] if known == -1 else -1)
            token += 1
        assert step.seq_lens[r] == prefix + extend
        assert token - 1 == (r if step.sample_rows is None else step.sample_rows[r])
    assert len(step.token_ids) == (32 if padded else token)
    assert not step.slot_mapping[FULL][token:].any(), "padding writes to slot 0 of the scratch page"
    assert (step.slots[len(reqs) :] == table.padding_slot).all()
    assert all(x.dtype == np.int32 for x in (step.token_ids, step.positions, step.slots, step.cu_extend))


@pytest.mark.parametrize(("max_extend", "gathers"), [(1, False), (4, True)])
def test_only_a_step_that_may_extend_further_gathers_rows(max_extend: int, gathers: bool) -> None:
    """One form a bucket, whatever is in it: steps are compiled for it."""
    table = SlotTable(max_running=4, max_pages_per_req=4, vocab_size=10)
    plan = plan_of([(3, 1), (5, 1)], page_size=4)
    table.apply(plan)
    bucket = Bucket(num_tokens=4, num_reqs=4, max_extend=max_extend, num_pages=4)
    for step in (build_step_input(plan, table, 4, [bucket]), padding_input(bucket, table)):
        assert (step.sample_rows is not None) == gathers


def test_pages_sent_later_go_behind_those_sent_before() -> None:
    table = SlotTable(max_running=2, max_pages_per_req=4, vocab_size=10)
    first = plan_of([(0, 2)], page_size=1)
    table.apply(first)
    table.apply(
        StepPlan(
            step=1,
            mode="decode",
            slots=[0],
            prefix_lens=[2],
            extend_lens=[1],
            token_ids=[-1],
            sample=[True],
            page_starts={FULL: [2]},
            new_pages={FULL: [[9]]},
        )
    )
    assert table.page_table[FULL][0, :3].tolist() == [1, 2, 9]


def test_a_slot_forgets_its_former_req() -> None:
    table = SlotTable(max_running=2, max_pages_per_req=4, vocab_size=10)
    table._admit(
        SlotInit(slot=1, sampling=SamplingParams(top_k=3, min_p=0.5, logit_bias={1: 2.0}), seed=5, num_prompt_tokens=1)
    )
    assert table.adjusted[1] and table.top_k[1] == 3
    table._admit(SlotInit(slot=1, sampling=SamplingParams(temperature=0), seed=5, num_prompt_tokens=1))
    assert not table.adjusted[1]
    assert table.top_k[1] == 10 and table.temperature[1] == 0 and table.min_p[1] == 0


def test_a_step_that_no_bucket_holds() -> None:
    """An error that says what was needed; or, where the runtime takes exact shapes too, a step in its own shape."""
    table = SlotTable(max_running=5, max_pages_per_req=16, vocab_size=1000)
    plan = plan_of([(0, 9)], page_size=4)
    table.apply(plan)
    buckets = [Bucket(num_tokens=8, num_reqs=8, max_extend=8, num_pages=8)]
    with pytest.raises(LookupError, match="9 tokens, 1 reqs"):
        build_step_input(plan, table, 4, buckets)
    step = build_step_input(plan, table, 4, buckets, exact_too=True)
    assert not step.padded and (step.num_tokens, step.num_reqs, step.max_extend, step.num_pages) == (9, 1, 9, 3)
