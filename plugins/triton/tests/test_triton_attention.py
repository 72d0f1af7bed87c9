"""attn.paged against its body, through the interpreter: kinds of steps, masks, pools, plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sglang_triton import attention_plan
from triton_attention_cases import BATCHES, CPU, DTYPES, KV_DTYPES, Case, Reqs, spec_of

from sglang_core.api.ops import OPS

TREES: Reqs = [(63, 7), (0, 33), (140, 1), (5, 2)]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reqs", BATCHES.values(), ids=BATCHES)
def test_paged_is_the_body(reqs: Reqs, dtype: torch.dtype) -> None:
    Case(spec_of(), reqs, dtype).check()


def test_with_the_tiles_of_a_device(tiles: str) -> None:
    Case(spec_of(), BATCHES["mixed"], torch.bfloat16).check()


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (40, 1), (130, 1)])
def test_heads_that_share_keys(heads: int, kv_heads: int) -> None:
    """Groups that are no power of two, that fill more than one tile of the least rows, and more than one of the most."""
    Case(spec_of(heads, kv_heads, 16), [(37, 1), (20, 9)]).check()


@pytest.mark.parametrize("dim, v_dim", [(7, 5), (72, 72), (96, 40), (192, 128)])
def test_head_dims_that_are_no_power_of_two(dim: int, v_dim: int) -> None:
    Case(spec_of(2, 1, dim, v_head_dim=v_dim), [(37, 1), (10, 30)]).check()


@pytest.mark.parametrize("page_size", [1, 3, 64, 256])
def test_page_sizes(page_size: int) -> None:
    Case(spec_of(), [(65, 1), (10, 80), (300, 1)], page_size=page_size).check()


@pytest.mark.parametrize("reqs", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("facts", [{"window": 1}, {"window": 30, "soft_cap": 2.0}, {"causal": False}])
def test_windows_caps_and_full_attention(reqs: Reqs, facts: dict) -> None:
    Case(spec_of(**facts), reqs).check()


@pytest.mark.parametrize("facts", [{}, {"window": 9}])
@pytest.mark.parametrize("reqs", BATCHES.values(), ids=BATCHES)
def test_a_sink_is_counted_once(reqs: Reqs, facts: dict) -> None:
    Case(spec_of(has_sinks=True, **facts), reqs).check(sinks=torch.randn(3))


@pytest.mark.parametrize("facts", [{}, {"window": 1}, {"window": 3}, {"window": 20, "soft_cap": 2.0}])
def test_trees(facts: dict) -> None:
    """Binary ones, one of them of more tokens than a word of the mask has bits."""
    Case(spec_of(tree=True, **facts), TREES, tree_mask=binary_trees([n for _, n in TREES])).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES.values(), ids=KV_DTYPES)
def test_pools_of_other_dtypes(kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    Case(spec_of(4, 2), [(140, 1), (10, 9)], dtype, kv_dtype=kv_dtype).check()


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.int8])
def test_pools_of_codes_in_two_parts(kv_dtype: torch.dtype) -> None:
    Case(spec_of(2, 1, 24, v_head_dim=40, window=30), BATCHES["mixed"], kv_dtype=kv_dtype).check()


@pytest.mark.parametrize("reqs", [BATCHES["decode"], BATCHES["mixed"]], ids=["decode", "mixed"])
def test_a_bucket_is_the_body(reqs: Reqs) -> None:
    Case(spec_of(), reqs, padding=3).check()


@pytest.mark.parametrize("make", [attention_plan.plan, attention_plan.plan_invariant])
def test_a_long_range_is_split(make) -> None:
    case = Case(spec_of(2, 1, 16, has_sinks=True), [(1500, 1), (1200, 12), (5, 1)])
    assert make(case.spec, case.batch, CPU).static.num_parts
    case.check(sinks=torch.randn(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_req_alone_gives_the_bits_it_gives_in_a_batch(dtype: torch.dtype) -> None:
    """In a bucket, too: under the plan that says so."""
    make = attention_plan.plan_invariant
    case = Case(spec_of(2, 1, 16), [(700, 1), (40, 30), (600, 1), (0, 1)], dtype, padding=2)
    together, _ = case.run(make(case.spec, case.batch, CPU))
    for r in range(4):
        batch, rows = case.alone(r)
        inputs = (x[rows] for x in case.new)
        alone = case.kernel(*inputs, case.pool, 1, case.spec, make(case.spec, batch, CPU))
        assert torch.equal(alone, together[rows])


def test_reqs_and_tokens_that_only_fill_a_bucket_give_zeros() -> None:
    case = Case(spec_of(has_sinks=True), [(8, 1), (5, 2)], padding=2)
    case.batch.seq_lens_cpu[1] = 0
    case.batch.page_table_cpu[1:] = 10**6  # means nothing
    o, lse = case.run(sinks=torch.randn(3))
    assert not o[1:].any()
    assert (lse[1:] == float("-inf")).all()
    assert o[0].all()


def test_cross_attention_sees_all_of_the_encoder_and_writes_nothing() -> None:
    case = Case(spec_of(causal=False, cross=True), [(50, 0), (1, 0), (0, 0), (300, 0)])
    queries = torch.tensor([1, 20, 2, 40])
    q = torch.randn(63, 3, 32)
    batch = replace(
        case.batch,
        cu_extend_cpu=torch.tensor([0, *queries.cumsum(0)]).int(),
        slot_mapping_cpu=torch.zeros(63, dtype=torch.int32),
        num_tokens=63,
        max_extend=40,
    )
    args = (q, None, None, case.pool, 1, case.spec)
    want, want_lse = OPS["attn.paged"].body(*args, OPS["attn.plan"].body(case.spec, batch, CPU), lse=True)
    got, lse = case.kernel(*args, attention_plan.plan(case.spec, batch, CPU), lse=True)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)
    assert not got[21:23].any()


def test_an_empty_step() -> None:
    case = Case(spec_of(), [(5, 0), (16, 0)])
    assert case.run()[0].shape == (0, 3, 32)


def binary_trees(sizes: list[int]) -> torch.Tensor:
    """int32[T, W]: the children of token i are 2i + 1 and 2i + 2."""
    words = -(-max(sizes) // 32)
    rows: list[int] = []
    for size in sizes:
        first = len(rows)
        for i in range(size):
            rows.append(1 << i | (rows[first + (i - 1) // 2] if i else 0))
    split = [[row >> (32 * w) & 0xFFFFFFFF for w in range(words)] for row in rows]
    return torch.tensor(split, dtype=torch.int64).to(torch.int32)
