"""attn.rope_paged: what is rotated and what the pool holds of it against the ops it is made of; attention is tested with attn.paged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang_triton import attention_plan
from sglang_triton.rope_paged import rope_paged, turn_and_write
from torch import Tensor
from triton_attention_cases import BATCHES, CPU, Case, bits, spec_of
from triton_tolerance import assert_close

from sglang_core.api import Pool, PoolSpec
from sglang_core.api.ops import OPS, HeadNorms, RopeSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POSITIONS = torch.tensor([3, 0, 9, 9, 1], dtype=torch.int32)
SLOTS = torch.tensor([4, 19, 7, 0, 12], dtype=torch.int32)
EPS = 1e-5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pool_of(dtype: torch.dtype, heads: int, dim: int, v_dim: int) -> Pool:
    """Every byte the same; scales that differ from head to head."""
    spec = PoolSpec(num_layers=2, page_size=4, num_kv_heads=heads, head_dim=dim, v_head_dim=v_dim, dtype=dtype)
    pool = Pool(spec, 5, CPU)
    for leaf in pool.leaves:
        leaf.view(torch.uint8).fill_(7)
    if spec.scaling == "static":
        pool.set_scales(1, torch.linspace(0.5, 2.0, heads), torch.linspace(0.01, 0.1, heads))
    return pool


def heads_of(count: int, dim: int, dtype: torch.dtype) -> Tensor:
    """A slice of a wider tensor."""
    return (2 * torch.randn(5, count + 2, dim)).to(dtype)[:, 1:-1]


def norms_of(dim: int) -> HeadNorms:
    return HeadNorms(torch.rand(dim) + 0.5, torch.rand(dim) + 0.5, EPS)


def by_parts(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor, spec: RopeSpec, pool: Pool, norms: Any
) -> Tensor:
    if norms is not None:
        q, k = OPS["norm.rms"].body(q, norms.q, EPS), OPS["norm.rms"].body(k, norms.k, EPS)
    q, k = OPS["rope.apply"].body(q, k, positions, table, spec)
    OPS["kv.write"].body(k, v, pool, 1, SLOTS)
    return q


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize(("dim", "v_dim", "rotary_dim"), [(64, 64, 64), (20, 40, 6), (96, 24, 32)])
def test_rotated_and_written(
    dim: int, v_dim: int, rotary_dim: int, style: str, normed: bool, dtype: torch.dtype
) -> None:
    spec = RopeSpec(head_dim=dim, rotary_dim=rotary_dim, style=style)  # type: ignore[arg-type]
    q, k, v = heads_of(5, dim, dtype), heads_of(3, dim, dtype), heads_of(3, v_dim, dtype)
    norms = norms_of(dim) if normed else None
    pools = [pool_of(dtype, 3, dim, v_dim) for _ in range(2)]
    table = torch.randn(10, rotary_dim)
    got = turn_and_write(q, k, v, POSITIONS, table, spec, pools[0], 1, SLOTS, norms)
    assert_close(got, by_parts(q, k, v, POSITIONS, table, spec, pools[1], norms))
    (k_leaf, v_leaf), (want_k, want_v) = (pool.layer_leaves(1) for pool in pools)
    assert torch.equal(v_leaf, want_v)
    written = torch.zeros(20, dtype=torch.bool)
    written[SLOTS.long()] = True
    k_leaf, want_k = k_leaf.flatten(0, 1), want_k.flatten(0, 1)
    assert torch.equal(k_leaf[~written], want_k[~written]), "a slot of nobody was written"
    assert_close(k_leaf[written], want_k[written])
    if not normed:
        assert torch.equal(got[..., rotary_dim:], q[..., rotary_dim:])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("rotary_dim", [20, 6])
def test_codes_are_those_of_a_write(rotary_dim: int, stored: torch.dtype) -> None:
    """Angles of quarter turns: rotated numbers are numbers that were there, so that every bit of the pool is decided."""
    spec = RopeSpec(head_dim=20, rotary_dim=rotary_dim)
    turns = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, -1.0]])[torch.randint(3, (10, rotary_dim // 2))]
    table = torch.cat([turns[..., 0], turns[..., 1]], dim=1)
    q, k, v = heads_of(5, 20, torch.bfloat16), heads_of(3, 20, torch.bfloat16), heads_of(3, 40, torch.bfloat16)
    k[2] = 0.0
    pools = [pool_of(stored, 3, 20, 40) for _ in range(2)]
    got = turn_and_write(q, k, v, POSITIONS, table, spec, pools[0], 1, SLOTS, None)
    assert torch.equal(got, by_parts(q, k, v, POSITIONS, table, spec, pools[1], None))
    for mine, theirs in zip(*(pool.leaves for pool in pools), strict=True):
        assert torch.equal(bits(mine), bits(theirs))


@pytest.mark.parametrize("normed", [False, True])
def test_attention_sees_the_keys_of_its_step(normed: bool) -> None:
    spec = spec_of(soft_cap=5.0, has_sinks=True)
    case = Case(spec, BATCHES["mixed"])
    rotary = RopeSpec(head_dim=32, rotary_dim=32)
    positions = torch.randint(0, 9, (case.batch.num_tokens,), dtype=torch.int32)
    facts = {"head_norms": norms_of(32) if normed else None, "sinks": torch.randn(3), "lse": True}
    clones = [leaf.clone() for leaf in case.pool.leaves]
    at = positions, torch.randn(9, 32), rotary, case.pool, 1, spec
    want = OPS["attn.rope_paged"].body(*case.new, *at, OPS["attn.plan"].body(spec, case.batch, CPU), **facts)
    case.pool.leaves = clones
    got = rope_paged(*case.new, *at, attention_plan.plan(spec, case.batch, CPU), **facts)
    assert_close(got[0], want[0], scale=4.0)
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=2e-5)


def test_no_tokens_write_nothing() -> None:
    spec, pool = RopeSpec(head_dim=8, rotary_dim=8), pool_of(torch.float32, 2, 8, 8)
    before = [leaf.clone() for leaf in pool.leaves]
    none = torch.empty(0, dtype=torch.int32)
    q, kv = torch.empty(0, 4, 8), torch.empty(0, 2, 8)
    assert turn_and_write(q, kv, kv, none, torch.ones(1, 8), spec, pool, 0, none, None).shape == (0, 4, 8)
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(before, pool.leaves, strict=True))
