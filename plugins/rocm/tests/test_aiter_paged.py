"""attn.paged by AITER's stand-in (aiter_fake.py) and Triton, each for its reqs of a step."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from sglang_rocm.backend import RocmBackend
from torch import Tensor

from sglang_core.api import DeviceInfo, OpSite, Pool, PoolSpec
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec, RaggedBatch, RopeSpec
from sglang_core.backend.selection import BoundOp, OpTable

CPU = torch.device("cpu")
OPS_OF_ATTENTION = ("attn.paged", "attn.plan", "attn.rope_paged", "kv.write")
SIZE = 4  # of a page
MANY = 4


def spec_of(**facts: Any) -> AttnSpec:
    return AttnSpec(**({"num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "v_head_dim": 128, "scale": 0.09} | facts))


def bound(spec: AttnSpec, dtype: str = "bfloat16") -> dict[str, BoundOp]:
    info = DeviceInfo(backend="rocm", path="rocm/gfx942", name="test")
    table = OpTable(info, RocmBackend(), ops=OPS, page_size=SIZE)
    return table.bind_group([OpSite(op=op, layer="Attention", dtype=dtype, spec=spec) for op in OPS_OF_ATTENTION])


def step(
    spec: AttnSpec, reqs: list[tuple[int, int]], *, padding: int = 0, static: bool = False
) -> tuple[Pool, AttnBatch, list[Tensor]]:
    """reqs: (prefix, extend) each, over pages in random order; slots that nobody wrote hold NaN. `padding`: tokens of no req, that come last."""
    torch.manual_seed(0)
    lens = [prefix + extend for prefix, extend in reqs]
    pages = [-(-n // SIZE) for n in lens]
    shape = {"num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "v_head_dim": spec.v_head_dim}
    pool = Pool(PoolSpec(num_layers=2, page_size=SIZE, dtype=torch.bfloat16, **shape), sum(pages) + 1, CPU)
    pool.poison(range(pool.num_pages))
    table, new = torch.zeros(len(reqs), max(pages), dtype=torch.int32), []
    for r, own in enumerate((torch.randperm(sum(pages)) + 1).int().split(pages)):
        slots = (own[:, None] * SIZE + torch.arange(SIZE, dtype=torch.int32)).flatten()[: lens[r]]
        table[r, : pages[r]] = own
        new.append(slots[reqs[r][0] :])
        pool.scatter(1, slots[: reqs[r][0]], *torch.randn(2, reqs[r][0], spec.num_kv_heads, spec.head_dim).bfloat16())
    extends = [extend for _, extend in reqs]
    tokens = sum(extends) + padding
    batch = AttnBatch(
        cu_extend_cpu=torch.tensor([0, *extends]).cumsum(0).int(),
        prefix_lens_cpu=torch.tensor([prefix for prefix, _ in reqs]).int(),
        seq_lens_cpu=torch.tensor(lens).int(),
        page_table_cpu=table,
        slot_mapping_cpu=torch.cat([*new, torch.zeros(padding, dtype=torch.int32)]),
        num_tokens=tokens,
        num_reqs=len(reqs),
        max_extend=max(extends),
        num_pages=table.shape[1],
        page_size=SIZE,
        static=static,
    )
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    return pool, batch, [torch.randn(tokens, n, spec.head_dim).bfloat16() for n in heads]


@pytest.fixture
def calls(aiter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Queries and keys of each call of AITER; extends of MANY tokens go to it."""
    from sglang_rocm import aiter_attention, aiter_paged

    seen: list[tuple[int, int]] = []

    def counted(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append((q.shape[0], k.shape[0]))
        return aiter.flash_attn_varlen_func(q, k, *args, **kwargs)

    monkeypatch.setattr(aiter_attention, "flash_attn_varlen_func", counted)
    monkeypatch.setattr(aiter_paged, "MANY", MANY)
    return seen


REQS = {
    "all extend by many, from nothing": ([(0, 5), (0, 9)], (14, 14)),
    "all extend by many": ([(0, 5), (7, 4)], (9, 16)),
    "some decode": ([(9, 1), (0, 5), (7, 4), (2, 2)], (9, 16)),
}


@pytest.mark.parametrize(("reqs", "call"), REQS.values(), ids=REQS)
@pytest.mark.parametrize("facts", [{}, {"causal": False, "num_kv_heads": 1}])
@pytest.mark.parametrize("padding", [0, 2])
def test_it_is_the_op(
    reqs: list[tuple[int, int]],
    call: tuple[int, int],
    facts: dict[str, Any],
    padding: int,
    calls: list[tuple[int, int]],
) -> None:
    """Keys to be written, and written already."""
    spec = spec_of(**facts)
    ops = bound(spec)
    assert {op.provider for op in ops.values()} == {"aiter"}
    pool, batch, new = step(spec, reqs, padding=padding)
    given = [leaf.clone() for leaf in pool.leaves]
    want, want_lse = OPS["attn.paged"].body(*new, pool, 1, spec, OPS["attn.plan"].body(spec, batch, CPU), lse=True)
    pool.leaves = given
    plan = ops["attn.plan"].fn(spec, batch, CPU)
    for keys in (new[1:], [None, None]):
        o, lse = ops["attn.paged"].fn(new[0], *keys, pool, 1, spec, plan, lse=True)
        torch.testing.assert_close(o, want, rtol=2**-7, atol=1e-2)
        torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
        assert torch.equal(ops["attn.paged"].fn(new[0], *keys, pool, 1, spec, plan), o)
    assert calls == [call] * 4


def test_heads_are_rotated_and_written_by_one_launch_before_it(calls: list[tuple[int, int]]) -> None:
    spec, reqs = spec_of(), [(9, 1), (0, 5), (7, 4)]
    ops = bound(spec)
    pool, batch, new = step(spec, reqs)
    given = [leaf.clone() for leaf in pool.leaves]
    places = torch.cat([torch.arange(prefix, prefix + extend, dtype=torch.int32) for prefix, extend in reqs])
    args = *new, places, torch.randn(16, 128), RopeSpec(head_dim=128, rotary_dim=128)
    want = OPS["attn.rope_paged"].body(*args, pool, 1, spec, OPS["attn.plan"].body(spec, batch, CPU))
    pool.leaves = given
    op = ops["attn.rope_paged"]
    assert [kernel.fn for kernel in op.kernels] == ["sglang_rocm.aiter_paged:rope_paged"]
    got = op.fn(*args, pool, 1, spec, ops["attn.plan"].fn(spec, batch, CPU))
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2e-2)
    assert calls == [(9, 16)]


@pytest.mark.parametrize(
    ("reqs", "more", "reach"),
    [
        ([(9, 1), (4, 3)], {}, 2**31),  # no long extend
        ([(0, 5), (7, 4)], {"static": True}, 2**31),  # a graph
        ([(0, 5), (7, 4)], {}, 16 * 2 * 128 * 2),  # keys of too many bytes
    ],
)
def test_other_steps_are_tritons(
    reqs: list[tuple[int, int]],
    more: dict[str, bool],
    reach: int,
    calls: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang_rocm import aiter_attention

    monkeypatch.setattr(aiter_attention, "REACH", reach)
    spec = spec_of()
    ops = bound(spec)
    pool, batch, new = step(spec, reqs, **more)
    plan = ops["attn.plan"].fn(spec, batch, CPU)
    assert type(plan).__module__ == "sglang_triton.attention_plan"
    want = OPS["attn.paged"].body(*new, pool, 1, spec, OPS["attn.plan"].body(spec, batch, CPU))
    torch.testing.assert_close(ops["attn.paged"].fn(*new, pool, 1, spec, plan), want, rtol=2**-7, atol=1e-2)
    assert not calls


def test_packed_keys_of_too_many_bytes_are_tritons(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang_rocm import aiter_attention

    torch.manual_seed(0)
    spec, lens = spec_of(), [3, 4]
    batch = RaggedBatch.of(lens, lens, torch.device("cpu"))
    q, k, v = (torch.randn(7, n, 128).bfloat16() for n in (4, 2, 2))
    want = OPS["attn.ragged"].body(q, k, v, batch, spec)
    for reach, called in ((7 * 2 * 128 * 2, 0), (7 * 2 * 128 * 2 + 1, 1)):
        monkeypatch.setattr(aiter_attention, "REACH", reach)
        got = aiter_attention.ragged(q, k, v, batch, spec)
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-2)
        assert len(calls) == called


@pytest.mark.usefixtures("aiter")
@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"head_dim": 192}, "heads of 128, not 192 and 128"),
        ({"window": 8}, "not called for windows"),
        ({"has_sinks": True, "tree": True}, "not called for sinks, trees of drafts"),
        ({"soft_cap": 30.0}, "not called for soft caps"),
        ({"kv_dtype": "fp8_e4m3"}, "not called for keys in fp8_e4m3"),
    ],
)
def test_what_it_is_not_for(facts: dict[str, Any], reason: str) -> None:
    op = bound(spec_of(**facts))["attn.paged"]
    assert op.provider == "triton"
    assert any(kernel.startswith("aiter") and reason in why for kernel, why in op.refused)
