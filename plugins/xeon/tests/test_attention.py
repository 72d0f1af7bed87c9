from __future__ import annotations

import dataclasses

import pytest
import torch
from sglang_xeon import attention
from tolerance import assert_close

from sglang_core.api import Pool, PoolSpec
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec

DTYPES = [torch.bfloat16, torch.float32]
PAGED, PLAN = OPS["attn.paged"].body, OPS["attn.plan"].body
CPU = torch.device("cpu")


def make_spec(heads: int = 4, kv_heads: int = 2, dim: int = 64, v_dim: int | None = None, **facts) -> AttnSpec:
    return AttnSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim or dim, scale=dim**-0.5, **facts
    )


class Case:
    """Reqs with prefixes in the pool, all else of the pool NaN, and this step's q, k, v."""

    def __init__(
        self, spec: AttnSpec, reqs: list[tuple[int, int]], dtype: torch.dtype, *, page_size: int = 4, kv_dtype=None
    ) -> None:
        self.spec, self.dtype = spec, dtype
        lens = torch.tensor([p + e for p, e in reqs], dtype=torch.int32)
        pages = [-(-int(n) // page_size) for n in lens]
        order = (torch.randperm(sum(pages)) + 1).tolist()
        table = torch.zeros(len(reqs), max(pages, default=0) + 1, dtype=torch.int32)
        slots: list[int] = []
        for r, (prefix, extend) in enumerate(reqs):
            table[r, : pages[r]] = torch.tensor([order.pop() for _ in range(pages[r])], dtype=torch.int32)
            slots += [int(table[r, i // page_size]) * page_size + i % page_size for i in range(prefix, prefix + extend)]
        self.pool = Pool(
            PoolSpec(
                num_layers=2,
                page_size=page_size,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                v_head_dim=spec.v_head_dim,
                dtype=kv_dtype or dtype,
            ),
            sum(pages) + 1,
            CPU,
        )
        for leaf in self.pool.leaves:
            leaf.fill_(float("nan"))
        for r, (prefix, _) in enumerate(reqs):
            at = torch.tensor([int(table[r, i // page_size]) * page_size + i % page_size for i in range(prefix)])
            k, v = torch.randn(prefix, *self.k_dims), torch.randn(prefix, *self.v_dims)
            self.pool.scatter(1, at.int(), k, v)
            if spec.window is not None:  # the core has let go of pages before it: the table names scratch there
                table[r, : max(0, prefix - spec.window) // page_size] = 0
        extends = [e for _, e in reqs]
        tokens = sum(extends)
        self.batch = AttnBatch(
            cu_extend_cpu=torch.tensor([0, *torch.tensor(extends).cumsum(0).tolist()], dtype=torch.int32),
            prefix_lens_cpu=torch.tensor([p for p, _ in reqs], dtype=torch.int32),
            seq_lens_cpu=lens,
            page_table_cpu=table,
            slot_mapping_cpu=torch.tensor(slots, dtype=torch.int32),
            num_tokens=tokens,
            num_reqs=len(reqs),
            max_extend=max(extends, default=0),
            num_pages=table.shape[1],
            page_size=page_size,
        )
        # A merged projection gives views: rows are not next to each other.
        qkv = torch.randn(tokens, spec.num_heads + spec.num_kv_heads, spec.head_dim).to(dtype)
        self.q, self.k = qkv[:, : spec.num_heads], qkv[:, spec.num_heads :]
        self.v = torch.randn(tokens, *self.v_dims).to(dtype)

    @property
    def k_dims(self) -> tuple[int, int]:
        return self.spec.num_kv_heads, self.spec.head_dim

    @property
    def v_dims(self) -> tuple[int, int]:
        return self.spec.num_kv_heads, self.spec.v_head_dim

    def check(self, **kwargs) -> None:
        clones = [leaf.clone() for leaf in self.pool.leaves]
        want, want_lse = PAGED(
            self.q, self.k, self.v, self.pool, 1, self.spec, PLAN(self.spec, self.batch, CPU), lse=True, **kwargs
        )
        want_leaves, self.pool.leaves = self.pool.leaves, clones
        plan = attention.plan(self.spec, self.batch, CPU)
        got, got_lse = attention.paged(self.q, self.k, self.v, self.pool, 1, self.spec, plan, lse=True, **kwargs)
        assert_close(got, want)
        # One more exponential's error, and no rounding to the activations' dtype.
        torch.testing.assert_close(got_lse, want_lse, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(self.pool.leaves, want_leaves, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        again = attention.paged(self.q, None, None, self.pool, 1, self.spec, plan, **kwargs)
        assert torch.equal(again, got)


BATCHES = {
    "decode": [(37, 1), (0, 1), (130, 1), (63, 1), (64, 1)],
    "prefill": [(0, 5), (0, 70), (0, 200)],
    "extend": [(20, 3), (64, 65), (7, 130)],
    "mixed": [(100, 1), (0, 50), (3, 1), (40, 17)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reqs", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 2, 64), (2, 2, 128), (8, 1, 32), (6, 2, 128), (32, 2, 16)])
def test_paged_is_the_body(
    level: str, dtype: torch.dtype, reqs: list[tuple[int, int]], heads: int, kv_heads: int, dim: int
) -> None:
    Case(make_spec(heads, kv_heads, dim), reqs, dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, v_dim", [(12, 12), (7, 5), (80, 80), (96, 32), (192, 128)])
def test_odd_head_dims(level: str, dtype: torch.dtype, dim: int, v_dim: int) -> None:
    Case(make_spec(4, 2, dim, v_dim), [(37, 1), (10, 30), (0, 3)], dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
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
    whole = attention.paged(case.q, case.k, case.v, case.pool, 1, spec, attention.plan(spec, b, CPU))
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
        plan = attention.plan(spec, alone, CPU)
        assert torch.equal(attention.paged(case.q[rows], None, None, case.pool, 1, spec, plan), whole[rows])


@pytest.mark.parametrize("dtype, kv_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_pool_of_another_dtype(level: str, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    for reqs in BATCHES.values():
        Case(make_spec(), reqs, dtype, kv_dtype=kv_dtype).check()


def test_queries_that_see_no_key_and_padding_give_zeros(level: str) -> None:
    case = Case(make_spec(), [(8, 1), (5, 2)], torch.float32)
    b = case.batch
    b.seq_lens_cpu[1] = 0  # a req that only fills a bucket
    b.page_table_cpu[1] = 10**6  # and whose pages mean nothing
    q = torch.cat([case.q, torch.randn(3, 4, 64)])  # tokens of no req
    plan = attention.plan(case.spec, b, CPU)
    o, lse = attention.paged(q, None, None, case.pool, 1, make_spec(), plan, lse=True)
    assert not o[1:].any()
    assert (lse[1:] == float("-inf")).all()


def test_an_empty_batch(level: str) -> None:
    case = Case(make_spec(), [], torch.float32)
    plan = attention.plan(case.spec, case.batch, CPU)
    assert attention.paged(case.q, case.k, case.v, case.pool, 0, case.spec, plan).shape == (0, 4, 64)


def test_plan_fills_an_earlier_one() -> None:
    first, second = Case(make_spec(), [(4, 1)], torch.float32), Case(make_spec(), [(7, 1)], torch.float32)
    plan = attention.plan(first.spec, first.batch, CPU)
    assert attention.plan(second.spec, second.batch, CPU, plan) is plan
    assert plan.seq_lens.tolist() == [8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 33, 100])
def test_kv_write_is_the_body(level: str, dtype: torch.dtype, kv_dtype: torch.dtype, tokens: int) -> None:
    spec = PoolSpec(num_layers=1, page_size=4, num_kv_heads=3, head_dim=10, v_head_dim=6, dtype=kv_dtype)
    mine, theirs = Pool(spec, 40, CPU), Pool(spec, 40, CPU)
    for leaf in (*mine.leaves, *theirs.leaves):
        leaf.zero_()
    slots = torch.randperm(160)[:tokens].int()
    k, v = torch.randn(tokens, 5, 10).to(dtype)[:, 1:4], torch.randn(tokens, 3, 6).to(dtype)
    attention.kv_write(k, v, mine, 0, slots)
    OPS["kv.write"].body(k, v, theirs, 0, slots)
    assert torch.equal(mine.k(0), theirs.k(0))
    assert torch.equal(mine.v(0), theirs.v(0))
