"""Attention ops against dense softmax in float64, over pools whose unused slots are NaN."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglang_core.ops.attention import AttnSpec, RaggedBatch, attn_merge, attn_paged, attn_plan, attn_ragged, kv_write
from tests.ops.paged_case import CPU, PagedCase, attn_spec, naive_attention, naive_paged, paged_case

# Rounding of the output to its dtype, plus float32 sums inside.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

REQS = {
    "decode": [(7, 1), (0, 1), (300, 1), (31, 1)],
    "prefill": [(0, 5), (0, 1), (0, 33)],
    "mixed": [(13, 1), (0, 40), (3, 3), (600, 1), (9, 17)],
    "chunk of a long prompt": [(260, 130)],
    "one token": [(0, 1)],
    "no tokens": [(5, 0), (0, 0)],
}


def run(case: PagedCase, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        plan = attn_plan(case.spec, case.batch, CPU)
        o, lse = attn_paged(case.q, case.k, case.v, case.pool, 0, case.spec, plan, sinks=sinks, lse=True)
    return o, lse


def check(case: PagedCase, sinks: Tensor | None = None, tolerance: float = 0.0) -> None:
    o, lse = run(case, sinks)
    want_o, want_lse = naive_paged(case, sinks)
    tolerance = tolerance or TOLERANCE[case.q.dtype]
    assert o.dtype == case.q.dtype
    torch.testing.assert_close(o.double(), want_o, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, atol=max(2e-6, tolerance / 100), rtol=1e-5)


@pytest.mark.parametrize("reqs", REQS.values(), ids=REQS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_paged_is_dense_attention(reqs: list[tuple[int, int]], dtype: torch.dtype) -> None:
    check(paged_case(reqs, dtype=dtype))


@pytest.mark.parametrize("page_size", [1, 2, 16, 64, 512])
def test_page_size_changes_nothing(page_size: int) -> None:
    check(paged_case(REQS["mixed"], page_size=page_size))


@pytest.mark.parametrize("window", [1, 2, 5, 16, 299, 10_000])
@pytest.mark.parametrize("static", [False, True])
def test_window(window: int, static: bool) -> None:
    check(paged_case(REQS["mixed"], spec=attn_spec(window=window), static=static))


@pytest.mark.parametrize("prefix", [255, 256, 300, 511, 700])
def test_window_in_a_bucket_visits_every_page_it_touches(prefix: int) -> None:
    """A page is as long as a chunk, so a page too few is a chunk too few."""
    check(paged_case([(prefix, 1)], spec=attn_spec(window=200), page_size=256, static=True))


@pytest.mark.parametrize(
    "spec",
    [
        attn_spec(soft_cap=2.0),
        attn_spec(scale=1.0),
        attn_spec(num_heads=6, num_kv_heads=6),
        attn_spec(num_heads=7, num_kv_heads=1, head_dim=6, v_head_dim=10),
        attn_spec(soft_cap=3.0, window=9),
        attn_spec(causal=False),
    ],
    ids=str,
)
def test_specs(spec: AttnSpec) -> None:
    check(paged_case(REQS["mixed"], spec=spec))


def test_sinks_join_the_denominator() -> None:
    sinks = torch.tensor([-1.0, 0.0, 2.0, 30.0])
    check(paged_case(REQS["mixed"], spec=attn_spec(has_sinks=True, window=20)), sinks)


@pytest.mark.parametrize("static", [False, True])
def test_without_causality_every_query_sees_its_whole_req(static: bool) -> None:
    case = paged_case(REQS["mixed"], spec=attn_spec(causal=False, soft_cap=4.0), static=static)
    check(case)
    o, _ = run(case)
    causal = run(replace(case, spec=attn_spec(soft_cap=4.0)))[0]
    assert torch.equal(o[0], causal[0]) and not torch.isclose(o[1], causal[1]).all()


def cross_case(lens: list[tuple[int, int]], *, static: bool, kv_dtype: torch.dtype | None = None) -> PagedCase:
    """lens: (keys of another text, queries) each. Slot 0 is scratch, and its page is NaN."""
    spec = attn_spec(causal=False, cross=True)
    case = paged_case([(keys, 0) for keys, _ in lens], spec=spec, kv_dtype=kv_dtype)
    queries = torch.tensor([0, *(n for _, n in lens)])
    padding = 3 if static else 0
    total = int(queries.sum()) + padding
    case.batch = replace(
        case.batch,
        cu_extend_cpu=queries.cumsum(0).to(torch.int32),
        slot_mapping_cpu=torch.zeros(total, dtype=torch.int32),
        num_tokens=total,
        max_extend=int(queries.max()) + padding,
        static=static,
    )
    case.q = torch.randn(total, spec.num_heads, spec.head_dim)
    return case


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("lens", [[(7, 3), (300, 1), (1, 140), (40, 40)], [(0, 2), (5, 1)]])
def test_cross_attention_sees_all_of_another_text_and_writes_nothing(
    lens: list[tuple[int, int]], static: bool, kv_dtype: torch.dtype | None
) -> None:
    case = cross_case(lens, static=static, kv_dtype=kv_dtype)
    before = [leaf.clone() for leaf in case.pool.leaves]
    plan = attn_plan(case.spec, case.batch, CPU)
    o, lse = attn_paged(case.q, None, None, case.pool, 0, case.spec, plan, lse=True)
    cu = case.batch.cu_extend_cpu.tolist()
    for r, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        rows = slice(cu[r], cu[r + 1])
        if not len(keys):
            assert (o[rows] == 0).all() and (lse[rows] == -math.inf).all()
            continue
        want_o, want_lse = naive_attention(case.q[rows], keys, values, case.spec)
        torch.testing.assert_close(o[rows].double(), want_o, atol=3e-6, rtol=3e-6)
        torch.testing.assert_close(lse[rows].double(), want_lse, atol=3e-6, rtol=1e-5)
    assert (o[cu[-1] :] == 0).all()
    for old, leaf in zip(before, case.pool.leaves, strict=True):
        assert torch.equal(old.view(torch.uint8), leaf.view(torch.uint8))


def test_cross_attention_takes_no_new_keys_no_window_and_no_order() -> None:
    case = cross_case([(7, 3)], static=False)
    k, v = torch.zeros(3, 2, 8), torch.zeros(3, 2, 8)
    plan = attn_plan(case.spec, case.batch, CPU)
    with pytest.raises(AssertionError, match=r"writes nothing"):
        attn_paged(case.q, k, v, case.pool, 0, case.spec, plan)
    for more in ({"window": 3}, {"causal": True}, {"tree": True}):
        with pytest.raises(AssertionError):
            replace(case.spec, **more)  # type: ignore[arg-type]


def test_large_scores_do_not_overflow() -> None:
    check(paged_case(REQS["mixed"], spec=attn_spec(scale=100.0)), tolerance=1e-3)  # scores near 1000 round to 6e-5


@settings(max_examples=30, deadline=None)
@given(
    reqs=st.lists(st.tuples(st.integers(0, 150), st.one_of(st.just(1), st.integers(1, 150))), min_size=1, max_size=6),
    page_size=st.sampled_from([1, 3, 16]),
    window=st.one_of(st.none(), st.integers(1, 80)),
    static=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_batch(reqs: list[tuple[int, int]], page_size: int, window: int | None, static: bool, seed: int) -> None:
    spec = attn_spec(num_heads=2, num_kv_heads=1, head_dim=4, window=window)
    check(paged_case(reqs, spec=spec, page_size=page_size, static=static, seed=seed))


def test_padding_gives_zeros_and_changes_no_other_row() -> None:
    exact = run(paged_case(REQS["mixed"]))
    padded = run(paged_case(REQS["mixed"], static=True, num_tokens=100, num_reqs=9, max_extend=64, num_pages=300))
    n = len(exact[0])
    torch.testing.assert_close(padded[0][:n], exact[0])
    torch.testing.assert_close(padded[1][:n], exact[1])
    assert (padded[0][n:] == 0).all()
    assert (padded[1][n:] == -math.inf).all()


def test_a_bucket_of_nothing_but_padding_is_finite() -> None:
    case = paged_case([(0, 1)], static=True, num_tokens=4, num_reqs=4)
    for lens in (
        case.batch.seq_lens_cpu,
        case.batch.cu_extend_cpu,
        case.batch.page_table_cpu,
        case.batch.slot_mapping_cpu,
    ):
        lens.zero_()
    o, lse = run(case)
    assert (o == 0).all()
    assert (lse == -math.inf).all()


def test_a_row_that_extends_with_no_seq_len_is_finite() -> None:
    case = paged_case([(5, 1), (9, 1)])
    case.batch.seq_lens_cpu[1] = 0
    o, _ = run(case, torch.zeros(4))
    assert (o[1] == 0).all()
    assert o.isfinite().all()


def test_plan_of_a_bucket_is_refilled_in_place() -> None:
    sizes = {"static": True, "num_tokens": 100, "num_reqs": 8, "max_extend": 64, "num_pages": 160}
    first = paged_case(REQS["mixed"], **sizes)  # type: ignore[arg-type]
    second = paged_case([(20, 1), (0, 60), (77, 2)], seed=5, **sizes)  # type: ignore[arg-type]
    plan = attn_plan(first.spec, first.batch, CPU)
    addresses = [buffer.data_ptr() for buffer in plan.buffers()]
    static = plan.static
    again = attn_plan(second.spec, second.batch, CPU, out=plan)
    assert again is plan
    assert [buffer.data_ptr() for buffer in plan.buffers()] == addresses
    assert hash(again.static) == hash(static)
    o = attn_paged(second.q, second.k, second.v, second.pool, 0, second.spec, plan)
    torch.testing.assert_close(o.double(), naive_paged(second)[0], atol=2e-6, rtol=2e-6)


def test_keys_already_in_the_pool_need_not_come_again() -> None:
    case = paged_case(REQS["mixed"])
    plan = attn_plan(case.spec, case.batch, CPU)
    kv_write(case.k, case.v, case.pool, 0, plan.slot_mapping)
    o = attn_paged(case.q, None, None, case.pool, 0, case.spec, plan)
    torch.testing.assert_close(o.double(), naive_paged(case)[0], atol=2e-6, rtol=2e-6)


def test_pool_dtype_may_differ() -> None:
    case = paged_case(REQS["mixed"], dtype=torch.bfloat16)
    case.q = case.q.float()
    check(case)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, None)])
@pytest.mark.parametrize("lens", [[(3, 3), (1, 1), (140, 300)], [(0, 0), (2, 5), (0, 4), (7, 7)], [(0, 3), (0, 0)]])
def test_ragged_is_dense_attention(lens: list[tuple[int, int]], window: int | None, causal: bool) -> None:
    spec = attn_spec(causal=causal, window=window, soft_cap=4.0)
    num_q, num_k = (sum(n) for n in zip(*lens, strict=True))
    q, k, v = torch.randn(num_q + 2, 4, 8), torch.randn(num_k, 2, 8), torch.randn(num_k, 2, 8)
    batch = RaggedBatch.of(*zip(*lens, strict=True), CPU)
    o, lse = attn_ragged(q, k, v, batch, spec, lse=True)
    for r, (a, b) in enumerate(lens):
        rows, keys = (slice(int(cu[r]), int(cu[r]) + n) for cu, n in ((batch.cu_q, a), (batch.cu_k, b)))
        want_o, want_lse = naive_attention(q[rows], k[keys], v[keys], spec)
        torch.testing.assert_close(o[rows].double(), want_o, atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(lse[rows].double(), want_lse, atol=2e-6, rtol=2e-6)
    assert (o[-2:] == 0).all()
    assert (lse[-2:] == -math.inf).all()


def test_ragged_takes_slices_of_a_fused_projection() -> None:
    qkv = torch.randn(6, 8, 8)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    o = attn_ragged(q, k, v, RaggedBatch.of([6], [6], CPU), attn_spec())
    sdpa = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(o, sdpa[0].transpose(0, 1), atol=2e-6, rtol=2e-6)


def test_merge_of_two_halves_is_the_whole() -> None:
    spec = attn_spec(causal=False)
    q, k, v = torch.randn(5, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    whole = naive_attention(q, k, v, spec)
    a, b = naive_attention(q, k[:13], v[:13], spec), naive_attention(q, k[13:], v[13:], spec)
    o, lse = attn_merge(a[0].float(), a[1].float(), b[0].float(), b[1].float())
    torch.testing.assert_close(o.double(), whole[0], atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), whole[1], atol=2e-6, rtol=2e-6)


def test_merge_with_an_empty_side() -> None:
    o, lse = torch.randn(3, 4, 8), torch.randn(3, 4)
    nothing, none = torch.full((3, 4, 8), math.nan), torch.full((3, 4), -math.inf)
    for merged in (attn_merge(o, lse, nothing, none), attn_merge(nothing, none, o, lse)):
        torch.testing.assert_close(merged[0], o)
        torch.testing.assert_close(merged[1], lse)
    empty = attn_merge(nothing, none, nothing, none)
    assert (empty[0] == 0).all()
    assert (empty[1] == -math.inf).all()
