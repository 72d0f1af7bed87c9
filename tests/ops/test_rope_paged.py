"""attn.rope_paged is its parts, one after the other, on whatever stands for them."""

from __future__ import annotations

import pytest
import torch

from sglang_core.ops import OPS
from sglang_core.ops.attention import attn_paged, attn_plan
from sglang_core.ops.norm import rms_norm
from sglang_core.ops.rope import RopeSpec, rope_apply, rope_table
from sglang_core.ops.rope_paged import HeadNorms, rope_paged
from tests.ops.paged_case import CPU, attn_spec, paged_case

REQS = [(9, 1), (0, 20), (5, 3)]
ROTARY = RopeSpec(head_dim=8, rotary_dim=6)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_its_parts(dtype: torch.dtype, normed: bool) -> None:
    spec = attn_spec()
    cases = [paged_case(REQS, spec=spec, dtype=dtype) for _ in range(2)]
    plan = attn_plan(spec, cases[0].batch, CPU)
    positions = torch.tensor([9, *range(20), 5, 6, 7], dtype=torch.int32)
    rotary = RopeSpec(head_dim=spec.head_dim, rotary_dim=spec.head_dim - 2)
    table = rope_table(rotary, 32)
    norms = HeadNorms(*(torch.randn(2, spec.head_dim) + 1), 1e-5) if normed else None  # type: ignore[call-arg]
    a, b = cases
    got = rope_paged(a.q, a.k, a.v, positions, table, rotary, a.pool, 0, spec, plan, head_norms=norms, lse=True)
    q, k = b.q, b.k
    if norms is not None:
        q, k = rms_norm(q, norms.q, 1e-5), rms_norm(k, norms.k, 1e-5)
    q, k = rope_apply(q, k, positions, table, rotary)
    want = attn_paged(q, k, b.v, b.pool, 0, spec, plan, lse=True)
    assert all(map(torch.equal, got, want))
    mine, theirs = (torch.cat(case.pool.gather(0, case.batch.slot_mapping_cpu)) for case in cases)
    assert torch.equal(mine, theirs)


def test_norms_of_other_weights_give_something_else() -> None:
    spec = attn_spec()
    case = paged_case(REQS, spec=spec)
    plan = attn_plan(spec, case.batch, CPU)
    rotary = RopeSpec(head_dim=spec.head_dim, rotary_dim=spec.head_dim)
    at = torch.zeros(24, dtype=torch.int32), rope_table(rotary, 1), rotary, case.pool, 0, spec, plan
    ones, mixed = torch.ones(spec.head_dim), torch.linspace(-1, 2, spec.head_dim)
    outs = [
        rope_paged(case.q, case.k, case.v, *at, head_norms=norms)
        for norms in (None, HeadNorms(ones, ones, 1e-6), HeadNorms(mixed, ones, 1e-6), HeadNorms(ones, mixed, 1e-6))
    ]
    assert all(not torch.allclose(x, y) for i, x in enumerate(outs) for y in outs[:i])  # type: ignore[arg-type]


def test_a_decomposition_calls_what_stands_for_its_parts() -> None:
    called: list[str] = []

    def bind(part: str):  # type: ignore[no-untyped-def]
        return lambda *args, **kwargs: (called.append(part), OPS[part].body(*args, **kwargs))[1]

    spec = attn_spec()
    case = paged_case(REQS, spec=spec)
    plan = attn_plan(spec, case.batch, CPU)
    rotary = RopeSpec(head_dim=spec.head_dim, rotary_dim=spec.head_dim)
    fn, weight = OPS["attn.rope_paged"].decompose(bind), torch.ones(spec.head_dim)
    at = torch.zeros(24, dtype=torch.int32), rope_table(rotary, 1), rotary, case.pool, 0, spec, plan
    fn(case.q, case.k, case.v, *at, head_norms=HeadNorms(weight, weight, 1e-6))
    assert called == ["norm.rms", "norm.rms", "rope.apply", "attn.paged"]
