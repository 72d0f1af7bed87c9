"""The Pallas kernels, interpreted, against the op bodies: what comes out, and what is in the pool afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("jax")

from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where the simulator notes races
from jax.experimental.pallas import tpu as pltpu
from sglang_tpu import attention
from sglang_tpu.attention_plan import plan
from sglang_tpu.pools import LanePool, TpuPool

from sglang_core.api import Pool, PoolSpec
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec, MLASpec

CPU = torch.device("cpu")
Reqs = list[tuple[int, int]]  # (prefix, extend) each
DECODE: Reqs = [(39, 1), (0, 1), (300, 1)]
MIXED: Reqs = [(63, 1), (0, 40), (20, 33), (5, 2)]
HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "v_head_dim": 32, "scale": 0.3}


def batch_of(reqs: Reqs, page_size: int, padding: int = 0) -> AttnBatch:
    """Pages in random order. `padding` more reqs and tokens, as in a bucket."""
    counts = [-(-(prefix + extend) // page_size) for prefix, extend in reqs]
    pages = iter((torch.randperm(sum(counts)) + 1).tolist())
    table = torch.zeros(len(reqs) + padding, max(counts) + padding, dtype=torch.int32)
    slots = []
    for r, (prefix, extend) in enumerate(reqs):
        table[r, : counts[r]] = torch.tensor([next(pages) for _ in range(counts[r])])
        at = torch.arange(prefix, prefix + extend)
        slots.append(table[r, at // page_size] * page_size + at % page_size)
    extends = torch.tensor([0, *(extend for _, extend in reqs), *[0] * padding])
    prefix_lens = torch.tensor([prefix for prefix, _ in reqs] + [0] * padding, dtype=torch.int32)
    return AttnBatch(
        cu_extend_cpu=extends.cumsum(0).int(),
        prefix_lens_cpu=prefix_lens,
        seq_lens_cpu=prefix_lens + extends[1:].int(),
        page_table_cpu=table,
        slot_mapping_cpu=torch.cat([*slots, torch.zeros(padding)]).int(),
        num_tokens=int(extends.sum()) + padding,
        num_reqs=len(table),
        max_extend=int(extends.max()),
        num_pages=table.shape[1],
        page_size=page_size,
        static=padding > 0,
    )


def pools_of(spec: PoolSpec, batch: AttnBatch, kind: type[TpuPool] = LanePool) -> tuple[Pool, TpuPool]:
    """Two with the same prefixes, NaN elsewhere."""
    num_pages = int(batch.page_table_cpu.max()) + 1
    pools = Pool(spec, num_pages, CPU), kind(spec, num_pages)
    for pool in pools:
        pool.poison(range(num_pages))
    for row, length in zip(batch.page_table_cpu, batch.prefix_lens_cpu.tolist(), strict=True):
        at = torch.arange(length)
        slots = (row[at // spec.page_size] * spec.page_size + at % spec.page_size).int()
        k, v = (torch.randn(length, spec.num_kv_heads, d).to(spec.dtype) for d in (spec.head_dim, spec.v_head_dim))
        for pool in pools:
            pool.scatter(0, slots, k, v)
    return pools


def stored(pool: Pool) -> tuple[Tensor, Tensor]:
    """All of it but scratch, where padding goes."""
    size = pool.spec.page_size
    return pool.gather(0, torch.arange(size, pool.num_pages * size, dtype=torch.int32))


def compare(
    op: str,
    kernel: Any,
    spec: AttnSpec | MLASpec,
    pool_spec: PoolSpec,
    batch: AttnBatch,
    inputs: tuple[Tensor, ...],
    **more: Any,
) -> None:
    expected_pool, pool = pools_of(pool_spec, batch)
    plan_op = "attn.mla_plan" if isinstance(spec, MLASpec) else "attn.plan"
    expected = OPS[op].body(*inputs, expected_pool, 0, spec, OPS[plan_op].body(spec, batch, CPU), lse=True, **more)
    made = kernel(*inputs, pool, 0, spec, plan(spec, batch, CPU), lse=True, **more)
    coarse = inputs[0].dtype == torch.bfloat16
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if coarse else {"rtol": 1e-5, "atol": 1e-5}
    for x, y in zip(made, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance)
    for x, y in zip(stored(pool), stored(expected_pool), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def paged(
    spec: AttnSpec, reqs: Reqs, page_size: int = 16, dtype: torch.dtype = torch.float32, padding: int = 0
) -> None:
    torch.manual_seed(1)
    batch = batch_of(reqs, page_size, padding)
    pool_spec = PoolSpec(
        num_layers=1,
        page_size=page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        v_head_dim=spec.v_head_dim,
        dtype=dtype,
    )
    widths = ((spec.num_heads, spec.head_dim), (spec.num_kv_heads, spec.head_dim), (spec.num_kv_heads, spec.v_head_dim))
    inputs = tuple(torch.randn(batch.num_tokens, *width).to(dtype) for width in widths)
    more = {"sinks": torch.randn(spec.num_heads)} if spec.has_sinks else {}
    compare("attn.paged", attention.paged, spec, pool_spec, batch, inputs, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reqs", [DECODE, MIXED], ids=["decode", "mixed"])
def test_paged_is_the_op(reqs: Reqs, dtype: torch.dtype) -> None:
    paged(AttnSpec(**HEADS), reqs, dtype=dtype)


FACTS: dict[str, dict[str, Any]] = {
    "window and sinks": {"window": 20, "has_sinks": True},
    "soft cap": {"soft_cap": 2.0},
    "one KV head": {"num_kv_heads": 1},
    "not causal": {"causal": False},
    "odd heads and dims": {"num_heads": 6, "num_kv_heads": 3, "head_dim": 24, "v_head_dim": 136},
}


@pytest.mark.parametrize("facts", FACTS.values(), ids=FACTS.keys())
def test_paged_knows_facts_of_attention(facts: dict[str, Any]) -> None:
    paged(AttnSpec(**(HEADS | facts)), MIXED)


def test_paged_in_a_bucket_with_pages_larger_than_a_block_of_keys() -> None:
    paged(AttnSpec(**HEADS), MIXED, page_size=512, padding=3)


@pytest.mark.parametrize("reqs", [DECODE, MIXED], ids=["decode", "mixed"])
def test_mla_paged_is_the_op(reqs: Reqs) -> None:
    torch.manual_seed(2)
    spec = MLASpec(num_heads=4, rank=48, nope_dim=32, rope_dim=16, v_head_dim=32, scale=0.2)
    batch = batch_of(reqs, 16, padding=2)
    pool_spec = PoolSpec(
        kind="mla", num_layers=1, page_size=16, num_kv_heads=1, head_dim=48, v_head_dim=16, dtype=torch.float32
    )
    inputs = tuple(torch.randn(batch.num_tokens, *width) for width in ((4, 48), (4, 16), (48,), (16,)))
    compare("attn.mla_paged", attention.mla_paged, spec, pool_spec, batch, inputs)


def test_keys_that_are_there_already_are_not_written_again() -> None:
    torch.manual_seed(3)
    spec, batch = AttnSpec(**HEADS), batch_of(MIXED, 16)
    pool_spec = PoolSpec(num_layers=1, page_size=16, num_kv_heads=2, head_dim=32, v_head_dim=32, dtype=torch.float32)
    _, pool = pools_of(pool_spec, batch)
    q, k, v = (torch.randn(batch.num_tokens, heads, 32) for heads in (4, 2, 2))
    made = plan(spec, batch, CPU)
    at_once = attention.paged(q, k, v, pool, 0, spec, made)
    assert isinstance(at_once, Tensor) and at_once.equal(attention.paged(q, None, None, pool, 0, spec, made))


def test_whole_pages_and_single_tokens_are_written_where_they_belong() -> None:
    """Tokens that fill a page in order go there at once; those in another order, or of part of a page, one by one."""
    torch.manual_seed(4)
    spec = PoolSpec(num_layers=1, page_size=4, num_kv_heads=2, head_dim=8, v_head_dim=8, dtype=torch.float32)
    slots = torch.tensor([9, 10, 11, 4, 5, 6, 7, 12, 14, 13, 15, 16, 17], dtype=torch.int32)
    k, v = torch.randn(2, len(slots), 2, 8)
    pools = Pool(spec, 6, CPU), LanePool(spec, 6)
    for pool in pools:
        pool.poison(range(6))
    OPS["kv.write"].body(k, v, pools[0], 0, slots)
    attention.kv_write(k, v, pools[1], 0, slots)
    for x, y in zip(stored(pools[1]), stored(pools[0]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_no_copy_races_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Pallas' simulator of a TPU, whose copies take effect at any time until they are waited for, and where memory begins as NaN."""
    simulated = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")

    def simulate(kernel: Any, *args: Any) -> Any:
        return kernel(*args, interpret=simulated)

    monkeypatch.setattr(attention, "on_platform", simulate)
    attention.step.clear_cache()
    paged(replace(AttnSpec(**HEADS), window=30), [(40, 1), (3, 20), (0, 17)], page_size=8)
    attention.step.clear_cache()
    assert not interpret_pallas_call.races.races_found
