"""Which tokens attend in which call. Host work: nothing of torch_npu is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sglang_npu import attention_plan
from sglang_npu.attention_plan import NpuPlan, latent_plan, packed_plan, plan

from sglang_core.api.ops import AttnBatch, AttnSpec, MLASpec, Plan

SPEC = AttnSpec(num_heads=4, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.125)
LATENTS = MLASpec(num_heads=8, rank=512, nope_dim=128, rope_dim=64, v_head_dim=128, scale=0.1)
CPU = torch.device("cpu")


def batch(reqs: list[tuple[int, int]], page_size: int, *, padding: int = 0) -> AttnBatch:
    """(prefix, extend) each; req r has the pages 10 r, 10 r + 1, ..."""
    ints = torch.int32
    extends = torch.tensor([0] + [n for _, n in reqs] + [0] * padding)
    lens = [p + n for p, n in reqs] + [0] * padding
    columns = max(-(-n // page_size) for n in lens)
    table = (torch.arange(len(lens))[:, None] * 10 + torch.arange(columns)).to(ints)
    tokens = int(extends.sum()) + padding
    return AttnBatch(
        cu_extend_cpu=extends.cumsum(0).to(ints),
        prefix_lens_cpu=torch.tensor([p for p, _ in reqs] + [0] * padding, dtype=ints),
        seq_lens_cpu=torch.tensor(lens, dtype=ints),
        page_table_cpu=table,
        slot_mapping_cpu=torch.arange(tokens, dtype=ints),
        num_tokens=tokens,
        num_reqs=len(lens),
        max_extend=int(extends.max()),
        num_pages=columns,
        page_size=page_size,
        static=padding > 0,
    )


def planned(
    reqs: list[tuple[int, int]],
    page_size: int,
    *,
    padding: int = 0,
    window: int | None = None,
    by: Callable[..., Plan] = plan,
) -> NpuPlan:
    made = by(replace(SPEC, window=window), batch(reqs, page_size, padding=padding), CPU)
    assert isinstance(made, NpuPlan)
    return made


def test_a_decode_is_one_call_of_all_tokens() -> None:
    made = planned([(5, 1), (130, 1)], 128)
    assert made.rows is not None and made.rows.tokens is None and made.spans == ()
    assert made.rows.lens_cpu.tolist() == [6, 131] and made.rows.table.tolist() == [[0, 1], [10, 11]]
    assert made.rows.live.all()


def test_longer_queries_have_calls_of_their_own_where_pages_allow() -> None:
    made = planned([(5, 1), (100, 40), (0, 3), (7, 1)], 128)
    assert [(s.start, s.stop, s.ends, s.num_keys, s.table.tolist()) for s in made.spans] == [
        (1, 41, [40], [140], [[10, 11]]),
        (41, 44, [3], [3], [[20, 21]]),
    ]
    assert made.rows is not None and made.rows.tokens is not None
    assert made.rows.tokens.tolist() == [0, 44] and made.rows.lens_cpu.tolist() == [6, 8]


def test_queries_that_may_share_a_call_do() -> None:
    made = planned([(5, 1), (100, 40), (9, 0), (0, 3)], 128, by=packed_plan)
    (span,) = made.spans
    assert made.rows is None and (span.start, span.stop) == (0, 44)
    assert (span.ends, span.num_keys) == ([1, 41, 44], [6, 140, 3]) and span.table[:, 0].tolist() == [0, 10, 30]
    decode = planned([(5, 1), (130, 1)], 128, by=packed_plan)
    assert decode.spans == () and decode.rows is not None and decode.rows.tokens is None
    assert planned([(5, 2), (130, 2)], 64, by=packed_plan).spans == ()


@pytest.mark.parametrize("page_size", [32, 128])
def test_over_codes_longer_queries_are_spans_in_pages_of_any_size(page_size: int) -> None:
    spec = replace(SPEC, kv_dtype="int8")
    made = plan(spec, batch([(5, 1), (100, 40)], page_size), CPU)
    assert isinstance(made, NpuPlan)
    assert [(s.start, s.stop, s.num_keys) for s in made.spans] == [(1, 41, [140])] and made.rows is not None
    bucket = plan(spec, batch([(5, 2)], page_size, padding=1), CPU)
    assert isinstance(bucket, NpuPlan) and bucket.spans == ()


def test_one_call_takes_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "MOST_PACKED", 2)
    spans = planned([(0, 2), (3, 1), (0, 4)], 128, by=packed_plan).spans
    assert [(s.start, s.stop, s.ends) for s in spans] == [(0, 3, [2, 3]), (3, 7, [4])]


def test_a_window_leaves_the_blocks_behind_it_and_hides_keys_of_its_first() -> None:
    made = planned([(99, 1), (3, 1), (31, 1)], 16, window=20)  # it reaches over three blocks at most
    assert made.rows is not None and made.rows.hidden is not None
    assert made.rows.table.tolist() == [
        [5, 6, 6],
        [10, 11, 12],
        [20, 21, 22],
    ]  # past the table's end: its last column again
    assert made.rows.lens_cpu.tolist() == [20, 4, 32]
    assert made.rows.hidden.shape == (3, 1, 1, 48) and made.rows.hidden.sum(-1).flatten().tolist() == [0, 0, 12]
    assert made.rows.hidden[2, 0, 0, :12].all()


@pytest.mark.parametrize("by", [plan, packed_plan])
def test_longer_queries_leave_the_blocks_that_none_of_their_tokens_sees(by: Callable[..., Plan]) -> None:
    made = planned([(300, 40), (0, 3)], 128, window=30, by=by)
    assert [n for span in made.spans for n in span.num_keys] == [340 - 256, 3]
    assert [row for span in made.spans for row in span.table.tolist()] == [[2, 2, 2], [10, 11, 12]]


def test_a_bucket_has_its_windows_filled_again() -> None:
    spec = replace(SPEC, window=20)
    first = planned([(99, 1), (3, 1)], 16, padding=1, window=20)
    again = plan(spec, batch([(31, 1), (99, 1)], 16, padding=1), CPU, first)
    assert again is first and first.rows is not None and first.rows.hidden is not None
    assert first.rows.hidden.sum(-1).flatten().tolist() == [12, 0, 0] and first.rows.lens_cpu.tolist() == [32, 20, 1]


def test_a_prefill_alone_has_no_rows() -> None:
    assert planned([(0, 30)], 128).rows is None


@pytest.mark.parametrize("page_size", [16, 64, 640])
def test_elsewhere_every_token_is_a_row_that_sees_the_keys_up_to_its_own(page_size: int) -> None:
    made = planned([(5, 1), (3, 3)], page_size)
    assert made.spans == () and made.rows is not None and made.rows.tokens is None
    assert made.rows.lens_cpu.tolist() == [6, 4, 5, 6] and made.rows.table[:, 0].tolist() == [0, 10, 10, 10]


def test_padding_sees_one_key_of_page_0_and_is_not_live() -> None:
    made = planned([(5, 1), (3, 2)], 128, padding=2)
    assert made.spans == () and made.rows is not None  # a bucket's calls are its own
    assert made.rows.lens_cpu.tolist() == [6, 4, 5, 1, 1] and made.rows.table[:, 0].tolist() == [0, 10, 10, 0, 0]
    assert made.rows.live.flatten().tolist() == [True, True, True, False, False]


def test_a_req_that_extends_by_nothing_has_no_row() -> None:
    made = planned([(5, 0), (3, 1)], 128)
    assert made.rows is not None and made.rows.lens_cpu.tolist() == [4] and made.rows.table[:, 0].tolist() == [10]


def test_a_bucket_is_filled_again_where_it_lies() -> None:
    first = planned([(5, 1), (30, 1)], 128, padding=1)
    assert first.rows is not None
    places = [x.data_ptr() for x in (first.rows.table, first.rows.lens_cpu, first.rows.live, first.page_table)]
    other = batch([(8, 1), (1, 1)], 128, padding=1)
    again = plan(SPEC, replace(other, page_table_cpu=other.page_table_cpu + 3), CPU, first)
    assert (
        again is first and first.rows.lens_cpu.tolist() == [9, 2, 1] and first.rows.table[:, 0].tolist() == [3, 13, 0]
    )
    assert places == [x.data_ptr() for x in (first.rows.table, first.rows.lens_cpu, first.rows.live, first.page_table)]


def test_a_page_of_latents_is_blocks_in_a_row() -> None:
    made = latent_plan(LATENTS, batch([(60, 1), (70, 1)], 64), CPU)
    assert isinstance(made, NpuPlan) and made.rows is not None
    assert made.rows.table.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [40, 41, 42, 43, 44, 45, 46, 47]]
    whole = latent_plan(LATENTS, batch([(60, 1), (70, 1)], 128), CPU)
    assert isinstance(whole, NpuPlan) and whole.rows is not None and whole.rows.table.tolist() == [[0], [10]]
