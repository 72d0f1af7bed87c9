from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import BATCHES, CPU, DTYPES, Case, make_spec
from sglang_xeon import attention, attention_plan

from sglang_core.api import Pool, PoolSpec
from sglang_core.api.ops import OPS, AttnBatch

KV_DTYPES = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
TREES = [(63, 7), (0, 40), (300, 1), (90, 33), (5, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reqs", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (2, 2, 128), (8, 1, 32), (6, 2, 128), (32, 2, 16)])
def test_paged_is_the_body(
    level: str, dtype: torch.dtype, reqs: list[tuple[int, int]], heads: int, kv_heads: int, dim: int
) -> None:
    Case(make_spec(heads, kv_heads, dim), reqs, dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, v_dim", [(12, 12), (7, 5), (80, 80), (96, 96), (96, 32), (192, 128), (256, 256)])
def test_odd_head_dims(level: str, dtype: torch.dtype, dim: int, v_dim: int) -> None:
    Case(make_spec(4, 2, dim, v_dim), [(37, 1), (10, 30), (0, 3)], dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 128, 256])
def test_page_sizes(level: str, dtype: torch.dtype, page_size: int) -> None:
    Case(make_spec(), [(65, 1), (10, 80)], dtype, page_size=page_size).check()


@pytest.mark.parametrize("reqs", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    "facts",
    [
        {"window": 1},
        {"window": 30},
        {"window": 64},
        {"soft_cap": 2.0},
        {"causal": False},
        {"window": 9, "soft_cap": 1.5},
    ],
)
def test_windows_caps_and_full_attention(level: str, reqs: list[tuple[int, int]], facts: dict) -> None:
    Case(make_spec(**facts), reqs, torch.float32).check()


def test_sinks(level: str) -> None:
    sinks = torch.randn(4)
    for reqs in BATCHES.values():
        Case(make_spec(has_sinks=True), reqs, torch.float32).check(sinks=sinks)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("facts", [{}, {"window": 700}, {"has_sinks": True}])
def test_a_long_range_is_split_over_threads(level: str, threads: int, facts: dict) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kwargs = {"sinks": torch.randn(2)} if facts.get("has_sinks") else {}
        for reqs in ([(3000, 1)], [(2000, 1), (5, 1)], [(1500, 40)]):
            Case(make_spec(2, 1, 32, **facts), reqs, torch.float32, page_size=16).check(**kwargs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_req_alone_gives_the_bits_it_gives_in_a_batch(level: str, dtype: torch.dtype) -> None:
    spec = make_spec(4, 2, 64)
    reqs = [(1100, 1), (40, 30), (600, 1), (0, 200), (0, 1)]
    case = Case(spec, reqs, dtype, page_size=16)
    b = case.batch
    whole = attention.paged(*case.new, case.pool, 1, spec, attention_plan.plan(spec, b, CPU))
    for r, (_, extend) in enumerate(reqs):
        rows, one = slice(int(b.cu_extend_cpu[r]), int(b.cu_extend_cpu[r + 1])), slice(r, r + 1)
        alone = dataclasses.replace(
            b,
            cu_extend_cpu=torch.tensor([0, extend], dtype=torch.int32),
            prefix_lens_cpu=b.prefix_lens_cpu[one],
            seq_lens_cpu=b.seq_lens_cpu[one],
            page_table_cpu=b.page_table_cpu[one],
            slot_mapping_cpu=b.slot_mapping_cpu[rows],
            num_tokens=extend,
            num_reqs=1,
        )
        plan = attention_plan.plan(spec, alone, CPU)
        assert torch.equal(attention.paged(case.q[rows], None, None, case.pool, 1, spec, plan), whole[rows])


@pytest.mark.parametrize("dtype, kv_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_pool_of_another_dtype(level: str, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    for reqs in BATCHES.values():
        Case(make_spec(), reqs, dtype, kv_dtype=kv_dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES.values(), ids=KV_DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (5, 5, 128), (6, 2, 80), (16, 1, 24)])
def test_pools_of_codes(
    level: str, dtype: torch.dtype, kv_dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    for reqs in BATCHES.values():
        Case(make_spec(heads, kv_heads, dim), reqs, dtype, kv_dtype=kv_dtype).check()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES.values(), ids=KV_DTYPES)
@pytest.mark.parametrize("facts", [{"window": 30}, {"soft_cap": 2.0}, {"causal": False}])
def test_pools_of_codes_with_windows_and_caps(level: str, kv_dtype: torch.dtype, facts: dict) -> None:
    for reqs in BATCHES.values():
        Case(make_spec(**facts), reqs, torch.bfloat16, kv_dtype=kv_dtype).check()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES.values(), ids=KV_DTYPES)
def test_a_long_range_of_codes_is_split(level: str, kv_dtype: torch.dtype) -> None:
    Case(make_spec(), [(2000, 1), (1500, 40)], torch.bfloat16, page_size=16, kv_dtype=kv_dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("facts", [{}, {"window": 1}, {"window": 3}, {"window": 20, "soft_cap": 2.0}])
def test_trees(level: str, dtype: torch.dtype, facts: dict) -> None:
    """Binary ones, some beside chains, and some with two roots."""
    for first_child in (1, 2):
        trees = [[max(-1, (i - first_child) // 2) if i >= first_child else -1 for i in range(n)] for _, n in TREES]
        trees[1] = list(range(-1, TREES[1][1] - 1))
        Case(make_spec(tree=True, **facts), TREES, dtype, trees=trees).check()


def test_queries_that_see_no_key_and_padding_give_zeros(level: str) -> None:
    case = Case(make_spec(), [(8, 1), (5, 2)], torch.float32)
    b = case.batch
    b.seq_lens_cpu[1] = 0  # a req that only fills a bucket
    b.page_table_cpu[1] = 10**6  # and whose pages mean nothing
    q = torch.cat([case.q, torch.randn(3, 4, 64)])  # tokens of no req
    plan = attention_plan.plan(case.spec, b, CPU)
    o, lse = attention.paged(q, None, None, case.pool, 1, make_spec(), plan, lse=True)
    assert not o[1:].any()
    assert (lse[1:] == float("-inf")).all()


def test_an_empty_batch(level: str) -> None:
    case = Case(make_spec(), [], torch.float32)
    plan = attention_plan.plan(case.spec, case.batch, CPU)
    assert attention.paged(*case.new, case.pool, 0, case.spec, plan).shape == (0, 4, 64)


def test_plan_fills_an_earlier_one() -> None:
    first, second = Case(make_spec(), [(4, 1)], torch.float32), Case(make_spec(), [(7, 1)], torch.float32)
    plan = attention_plan.plan(first.spec, first.batch, CPU)
    assert attention_plan.plan(second.spec, second.batch, CPU, plan) is plan
    assert plan.seq_lens.tolist() == [8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", [*DTYPES, *KV_DTYPES.values()])
@pytest.mark.parametrize("tokens", [0, 1, 33, 100])
def test_kv_write_is_the_body(level: str, dtype: torch.dtype, kv_dtype: torch.dtype, tokens: int) -> None:
    spec = PoolSpec(num_layers=1, page_size=4, num_kv_heads=3, head_dim=42, v_head_dim=6, dtype=kv_dtype)
    mine, theirs = Pool(spec, 40, CPU), Pool(spec, 40, CPU)
    scales = torch.rand(2, 3) / 16 + 1 / 64
    for pool in (mine, theirs):
        for leaf in pool.leaves:
            leaf.zero_()
        if spec.scaling == "static":
            pool.set_scales(0, *scales)
    slots = torch.randperm(160)[:tokens].int()
    # Of all sizes: beyond the largest code, and where codes are subnormal.
    spread = torch.exp2(torch.randint(-12, 8, (tokens, 5, 42)).float())
    k = (torch.randn(tokens, 5, 42) * spread).to(dtype)[:, 1:4]
    v = torch.randn(tokens, 3, 6).to(dtype)
    k[:1, :1], v[:1, 1:2] = 0, 0
    attention.kv_write(k, v, mine, 0, slots)
    OPS["kv.write"].body(k, v, theirs, 0, slots)
    for written, expected in zip(mine.leaves, theirs.leaves, strict=True):
        assert torch.equal(written.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float8_e4m3fn])
def test_every_code_is_written_and_read(level: str, kv_dtype: torch.dtype) -> None:
    """Values of all codes, attended by one key each: what comes out is what is in the pool, to the rounding of float32."""
    bits = torch.arange(2 ** (8 * kv_dtype.itemsize)).to(torch.uint16 if kv_dtype.itemsize == 2 else torch.uint8)
    codes = bits.view(kv_dtype).float()
    codes = torch.where(codes.isfinite(), codes, 1.0).view(-1, 64)
    spec = PoolSpec(num_layers=1, page_size=1, num_kv_heads=1, head_dim=64, v_head_dim=64, dtype=kv_dtype)
    tokens = len(codes)
    pool = Pool(spec, tokens, CPU)
    slots = torch.arange(tokens, dtype=torch.int32)
    attention.kv_write(codes[:, None], codes[:, None], pool, 0, slots)
    assert torch.equal(pool.k(0).float().view(-1, 64), codes)
    one = torch.ones(tokens, dtype=torch.int32)
    batch = AttnBatch(
        cu_extend_cpu=torch.arange(tokens + 1, dtype=torch.int32),
        prefix_lens_cpu=one - 1,
        seq_lens_cpu=one,
        page_table_cpu=slots[:, None],
        slot_mapping_cpu=slots,
        num_tokens=tokens,
        num_reqs=tokens,
        max_extend=1,
        num_pages=1,
        page_size=1,
    )
    attend = make_spec(1, 1, 64)
    q = torch.randn(tokens, 1, 64)
    o = attention.paged(q, None, None, pool, 0, attend, attention_plan.plan(attend, batch, CPU))
    torch.testing.assert_close(o.view(-1, 64), codes, rtol=1e-6, atol=0)
