"""attn.paged on pages of 128 tokens, where longer queries are calls of their own or share one, against the op's body."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang_npu.attention import paged
from sglang_npu.attention_plan import packed_plan, plan
from sglang_npu.pools import CODED, CodedPool, NpuPool
from sglang_npu_emulation.contract import watched
from torch import Tensor

from sglang_core.api import Pool, PoolSpec
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec

CPU = torch.device("cpu")
PAGE = 128
REQS = [(5, 1), (300, 40), (0, 3), (129, 1), (127, 130)]  # (prefix, extend) each


def batch(reqs: list[tuple[int, int]], window: int | None) -> AttnBatch:
    """Req r has 4 pages of its own. Those that a window has left behind were given back, and page 0 stands for them."""
    prefix, extend = torch.tensor(reqs, dtype=torch.int32).unbind(1)
    table = 1 + torch.arange(4 * len(reqs), dtype=torch.int32).view(-1, 4)
    slots = [table[r, p // PAGE] * PAGE + p % PAGE for r, (a, n) in enumerate(reqs) for p in range(a, a + n)]
    for r, (a, _) in enumerate(reqs):
        table[r, : 0 if window is None else max(0, a + 1 - window) // PAGE] = 0
    return AttnBatch(
        cu_extend_cpu=torch.cat([torch.zeros(1, dtype=torch.int32), extend.cumsum(0).int()]),
        prefix_lens_cpu=prefix,
        seq_lens_cpu=prefix + extend,
        page_table_cpu=table,
        slot_mapping_cpu=torch.stack(slots).int(),
        num_tokens=int(extend.sum()),
        num_reqs=len(reqs),
        max_extend=int(extend.max()),
        num_pages=4,
        page_size=PAGE,
    )


def pools(spec: AttnSpec, given: AttnBatch, dtype: torch.dtype) -> tuple[NpuPool, NpuPool]:
    """The same numbers twice; NaN in page 0, which nobody reads."""
    facts: dict[str, Any] = {"num_layers": 1, "num_kv_heads": spec.num_kv_heads, "dtype": dtype}
    facts |= {"page_size": PAGE, "head_dim": spec.head_dim, "v_head_dim": spec.v_head_dim}
    made = [NpuPool(PoolSpec(**facts), 1 + 4 * given.num_reqs, CPU) for _ in range(2)]
    for pool in made:
        generator = torch.Generator().manual_seed(1)
        for leaf in pool.leaves:
            leaf.copy_(torch.randn(leaf.shape, generator=generator))
            leaf[0] = torch.nan
    return made[0], made[1]


def coded(spec: AttnSpec, given: AttnBatch) -> tuple[CodedPool, Pool]:
    """The same codes in a pool of NPUs and in a canonical one; scales of NaN in page 0."""
    facts: dict[str, Any] = {"num_layers": 1, "num_kv_heads": spec.num_kv_heads, "dtype": torch.int8}
    facts |= {"page_size": PAGE, "head_dim": spec.head_dim, "v_head_dim": spec.v_head_dim}
    num_pages = 1 + 4 * given.num_reqs
    slots = torch.arange(PAGE, num_pages * PAGE, dtype=torch.int32)
    written = [normal(len(slots), spec.num_kv_heads, spec.head_dim, dtype=torch.bfloat16, seed=s) for s in (1, 2)]
    mine, theirs = CodedPool(PoolSpec(**facts, layout=CODED), num_pages, CPU), Pool(PoolSpec(**facts), num_pages, CPU)
    for pool in (mine, theirs):
        pool.poison([0])
        pool.scatter(0, slots, *written)
    return mine, theirs


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("reqs", [REQS, [(500, 1), (3, 1)]], ids=["mixed", "decode"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 40, 200])
@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, torch.bfloat16), (128, torch.float16), (128, torch.bfloat16)], ids=["64", "half", "packed"]
)
def test_it_is_the_op(
    dim: int,
    dtype: torch.dtype,
    window: int | None,
    sinks: bool,
    reqs: list[tuple[int, int]],
) -> None:
    spec = AttnSpec(
        num_heads=4, num_kv_heads=2, head_dim=dim, v_head_dim=dim, scale=0.15, window=window, has_sinks=sinks
    )
    given = batch(reqs, window)
    q, k, v = (normal(given.num_tokens, heads, dim, dtype=dtype, seed=heads) for heads in (4, 2, 2))
    sink = {"sinks": normal(4, dtype=dtype, seed=9)} if sinks else {}
    mine, theirs = pools(spec, given, dtype)
    packs = dim == 128 and dtype is torch.bfloat16
    made = (packed_plan if packs else plan)(spec, given, CPU)
    with watched() as calls:
        o, lse = paged(q, k, v, mine, 0, spec, made, lse=True, **sink)
        again = paged(q, None, None, mine, 0, spec, made, **sink)
    expected = OPS["attn.paged"].body(
        q, k, v, theirs, 0, spec, OPS["attn.plan"].body(spec, given, CPU), lse=True, **sink
    )
    torch.testing.assert_close(o.float(), expected[0].float(), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, expected[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(again, o)
    num_calls = 1 if packs or len(reqs) == 2 else 4  # a call for all of one token, and one for each longer query
    assert calls["npu_fused_infer_attention_score_v2"] == 2 * num_calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 40])
def test_codes_are_attended_over_as_the_op_does(window: int | None, dtype: torch.dtype) -> None:
    spec = AttnSpec(num_heads=4, num_kv_heads=2, head_dim=64, v_head_dim=64, scale=0.15, window=window, kv_dtype="int8")
    given = batch(REQS, window)
    q, k, v = (normal(given.num_tokens, heads, 64, dtype=dtype, seed=heads) for heads in (4, 2, 2))
    mine, theirs = coded(spec, given)
    o, lse = paged(q, k, v, mine, 0, spec, plan(spec, given, CPU), lse=True)
    expected = OPS["attn.paged"].body(q, k, v, theirs, 0, spec, OPS["attn.plan"].body(spec, given, CPU), lse=True)
    torch.testing.assert_close(o.float(), expected[0].float(), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(
        lse, expected[1], atol=1e-2, rtol=1e-2
    )  # numbers of codes are rounded to the queries' dtype
    for a, b in zip(mine.leaves, theirs.leaves, strict=True):
        assert torch.equal(a[1:], b[1:])
    assert mine.k_scale(0)[..., 0].transpose(1, 2).is_contiguous() and mine.fingerprint != theirs.fingerprint
