"""Provider `jax`: its attention, interpreted, against the op's body; its pool against the canonical one; when it is chosen, and why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_tpu_attention import CPU, DECODE, HEADS, MIXED, Reqs, batch_of, pools_of, stored

pytest.importorskip("jax")

from sglang_tpu import jax_attention
from sglang_tpu.backend import HOST, TpuBackend
from sglang_tpu.pools import InterleavedPool

from sglang_core import Engine
from sglang_core.api import DeviceInfo, OpSite, Pool, PoolSpec
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec
from sglang_core.backend.selection import OpTable
from sglang_core.errors import KernelSelectionError

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},  # its values are rounded before they are weighed
}


def spec_of_pool(spec: AttnSpec, dtype: torch.dtype = torch.float32, page_size: int = 16, layers: int = 1) -> PoolSpec:
    return PoolSpec(
        num_layers=layers,
        page_size=page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        v_head_dim=spec.v_head_dim,
        dtype=dtype,
    )


def assert_is_the_op(spec: AttnSpec, batch: AttnBatch, dtype: torch.dtype = torch.float32) -> None:
    """Pools hold NaN where nobody wrote."""
    torch.manual_seed(1)
    pools = pools_of(spec_of_pool(spec, dtype, batch.page_size), batch, InterleavedPool)
    widths = ((spec.num_heads, spec.head_dim), (spec.num_kv_heads, spec.head_dim), (spec.num_kv_heads, spec.v_head_dim))
    inputs = tuple(torch.randn(batch.num_tokens, *width).to(dtype) for width in widths)
    expected = OPS["attn.paged"].body(*inputs, pools[0], 0, spec, OPS["attn.plan"].body(spec, batch, CPU))
    made = jax_attention.paged(*inputs, pools[1], 0, spec, jax_attention.plan(spec, batch, CPU))
    torch.testing.assert_close(made, expected, **TOLERANCE[dtype])
    for x, y in zip(stored(pools[1]), stored(pools[0]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reqs", [DECODE, MIXED], ids=["decode", "mixed"])
def test_paged_is_the_op(reqs: Reqs, dtype: torch.dtype) -> None:
    assert_is_the_op(AttnSpec(**HEADS), batch_of(reqs, 16), dtype)


@pytest.mark.parametrize(
    "facts",
    [{"soft_cap": 2.0}, {"num_kv_heads": 1}, {"head_dim": 24, "v_head_dim": 136}],
    ids=lambda facts: next(iter(facts)),
)
def test_paged_knows_facts_of_attention(facts: dict[str, Any]) -> None:
    assert_is_the_op(AttnSpec(**(HEADS | facts)), batch_of(MIXED, 16, padding=3))


def test_reqs_that_fill_a_bucket_read_nothing_of_others() -> None:
    """Between real ones, with tokens and without, and last; then a step of nothing else."""
    batch = batch_of([(20, 3), (0, 2), (7, 1), (0, 4)], 16, padding=2)
    seq_lens = batch.seq_lens_cpu.clone()
    seq_lens[torch.tensor([1, 3])] = 0
    slots = batch.slot_mapping_cpu.clone()
    slots[3:5] = slots[6:10] = 0
    dead = replace(batch, seq_lens_cpu=seq_lens, slot_mapping_cpu=slots)
    assert_is_the_op(AttnSpec(**HEADS), dead)
    none = replace(dead, cu_extend_cpu=torch.zeros_like(dead.cu_extend_cpu), seq_lens_cpu=torch.zeros_like(seq_lens))
    assert_is_the_op(AttnSpec(**HEADS), replace(none, slot_mapping_cpu=torch.zeros_like(slots)))


def test_a_plan_is_filled_in_place() -> None:
    spec = AttnSpec(**HEADS)
    first, then = (
        jax_attention.plan(spec, batch_of(reqs, 16, padding=2), CPU) for reqs in ([(3, 1)] * 2, [(9, 1)] * 2)
    )
    held = first.lengths
    jax_attention.plan(spec, batch_of([(9, 1)] * 2, 16, padding=2), CPU, first)
    assert first.lengths is held and held.equal(then.lengths) and held.tolist()[:2] == [10, 10]


def test_its_pool_is_the_canonical_one_to_whoever_asks() -> None:
    torch.manual_seed(2)
    spec = spec_of_pool(AttnSpec(**(HEADS | {"head_dim": 24})), layers=2)
    pools = Pool(spec, 5, CPU), InterleavedPool(spec, 5)
    slots = torch.tensor([17, 40, 18, 70], dtype=torch.int32)
    k, v = torch.randn(4, 2, 24), torch.randn(4, 2, 32)
    pages = torch.tensor([4, 1], dtype=torch.int32)
    found = []
    for pool in pools:
        pool.poison(range(5))
        pool.scatter(1, slots, k, v)
        pool.move(slots[:2], slots[2:])
        exported = pool.export_pages(1, pages)
        pool.import_pages(0, pages.flip(0), *exported)
        every = torch.arange(80, dtype=torch.int32)
        found.append(
            [
                *pool.gather(0, every),
                *pool.gather(1, every),
                *exported,
                *pool.gather_heads(1, slots.view(2, 2), torch.float32),
            ]
        )
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    assert pools[1].fingerprint != pools[0].fingerprint


TPU = DeviceInfo(backend="tpu", path="tpu/v6e", name="TPU v6 lite")


def bound(
    spec: AttnSpec, device: DeviceInfo, dtype: str, *, asked: bool = True, page_size: int = 64
) -> tuple[str, str]:
    """-> the provider of attn.paged, and the layout of its pool."""
    overrides = {"attn.paged": "jax"} if asked else {}
    table = OpTable(device, TpuBackend(), ops=OPS, overrides=overrides, page_size=page_size)
    dims = {"Hq": spec.num_heads, "Hk": spec.num_kv_heads, "D": spec.head_dim}
    sites = [
        OpSite(op=op, layer="Attention", dtype=dtype, spec=spec, dims=dims)
        for op in ("attn.paged", "attn.plan", "kv.write")
    ]
    return table.bind_group(sites)["attn.paged"].provider, table.pool_layout()


def test_it_runs_where_it_is_asked_for() -> None:
    assert bound(AttnSpec(**HEADS), TPU, "bfloat16") == ("jax", "jax.interleaved")
    assert bound(AttnSpec(**HEADS), TPU, "bfloat16", asked=False) == ("tpu", "tpu.lanes")


REFUSED: dict[str, dict[str, Any]] = {
    "knows no sinks": {"has_sinks": True},
    "knows no windows": {"window": 20},
    "knows no attention that is not causal": {"causal": False},
    "knows no tree masks": {"tree": True},
    "reads pools in the dtype of the activations, not fp8_e4m3": {"kv_dtype": "fp8_e4m3"},
    "keys and values of 3 heads in bfloat16 are 3 rows of words": {"num_heads": 6, "num_kv_heads": 3},
    "takes heads of 128 numbers or fewer on a TPU, not 256": {"v_head_dim": 256},
}


@pytest.mark.parametrize(("why", "facts"), REFUSED.items(), ids=REFUSED)
def test_it_says_what_it_does_not_know(why: str, facts: dict[str, Any]) -> None:
    with pytest.raises(KernelSelectionError, match=why):
        bound(AttnSpec(**(HEADS | facts)), TPU, "bfloat16")


def test_it_says_what_it_does_not_take_on_a_tpu() -> None:
    with pytest.raises(KernelSelectionError, match="takes bfloat16 on a TPU"):
        bound(AttnSpec(**HEADS), TPU, "float32")
    with pytest.raises(KernelSelectionError, match="multiple of 16 tokens, not 8"):
        bound(AttnSpec(**HEADS), TPU, "bfloat16", page_size=8)
    host = next(info for info in TpuBackend().probe() if info.path == HOST)
    assert bound(AttnSpec(**HEADS), host, "float32", page_size=8)[0] == "jax"


def test_no_log_sum_exp_comes_of_it() -> None:
    spec, batch = AttnSpec(**HEADS), batch_of(DECODE, 16)
    _, pool = pools_of(spec_of_pool(spec), batch, InterleavedPool)
    with pytest.raises(ValueError, match="no log-sum-exp"):
        jax_attention.paged(
            torch.zeros(3, 4, 32), None, None, pool, 0, spec, jax_attention.plan(spec, batch, CPU), lse=True
        )


def test_an_engine_runs_on_it() -> None:
    settings: dict[str, Any] = {"model_path": "demo", "dtype": "float32", "in_process": True, "max_running_requests": 2}
    settings |= {"context_length": 64, "chunked_prefill_size": 16, "max_total_tokens": 96}
    greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    found = []
    for more in ({"device": "cpu"}, {"device": "tpu:cpu", "kernel": ("attn.paged=jax",)}):
        with Engine(**settings, **more) as engine:
            found.append([a["output_ids"] for a in engine.generate(["The capital of France is", "x"], greedy)])
    assert found[0] == found[1]
