"""attn.rope_paged: the same bits as the kernels that it takes the place of, on every ISA level."""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, make_spec
from sglang_xeon import attention, attention_plan, norm, rope, rope_paged
from tolerance import assert_close
from torch import Tensor

from sglang_core.api.ops import OPS, HeadNorms, RopeSpec

DTYPES = [torch.bfloat16, torch.float32]
MIXED = [(9, 1), (0, 70), (30, 3)]
EPS = 1e-5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def norms_of(dim: int, dtype: torch.dtype) -> HeadNorms:
    return HeadNorms((torch.rand(dim) + 0.5).to(dtype), (torch.rand(dim) + 0.5).to(dtype), EPS)


class RopedCase(Case):
    """A step whose keys are yet to be rotated."""

    def turned(self, rotary: RopeSpec, norms: HeadNorms | None, *, fused: bool) -> tuple[Tensor, list[Tensor]]:
        """What attention gives, and the pool afterwards."""
        q, k, v = self.new
        table = torch.randn(300, rotary.rotary_dim, generator=torch.Generator().manual_seed(1))
        positions = torch.arange(q.shape[0], dtype=torch.int32)
        before = [leaf.clone() for leaf in self.pool.leaves]
        plan = attention_plan.plan(self.spec, self.batch, torch.device("cpu"))
        if fused:
            at = positions, table, rotary, self.pool, 1, self.spec, plan
            o = rope_paged.rope_paged(q, k, v, *at, head_norms=norms)
        else:
            if norms is not None:
                q, k = norm.rms_norm(q, norms.q, EPS), norm.rms_norm(k, norms.k, EPS)
            q, k = rope.rope_apply(q, k, positions, table, rotary)
            o = attention.paged(q, k, v, self.pool, 1, self.spec, plan)
        written = [leaf.clone() for leaf in self.pool.leaves]
        for leaf, old in zip(self.pool.leaves, before, strict=True):
            leaf.copy_(old)
        return o, written  # type: ignore[return-value]

    def check(self, rotary: RopeSpec, norms: HeadNorms | None) -> None:
        (o, pool), (want, theirs) = (self.turned(rotary, norms, fused=fused) for fused in (True, False))
        assert torch.equal(o, want)
        for mine, other in zip(pool, theirs, strict=True):
            assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (20, 12), (128, 32)])
@pytest.mark.parametrize("weights", [None, torch.bfloat16, torch.float32], ids=str)
def test_the_bits_of_its_parts(level: str, weights, dim: int, rotary_dim: int, style: str, dtype: torch.dtype) -> None:
    rotary = RopeSpec(head_dim=dim, rotary_dim=rotary_dim, style=style)  # type: ignore[arg-type]
    case = RopedCase(make_spec(4, 2, dim, v_dim=dim), MIXED, dtype)
    case.check(rotary, None if weights is None else norms_of(dim, weights))


@pytest.mark.parametrize("stored", [torch.float16, torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_those_of_a_write(level: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    case = RopedCase(make_spec(6, 3, 24, v_dim=40), MIXED, dtype, kv_dtype=stored)
    case.check(RopeSpec(head_dim=24, rotary_dim=24), norms_of(24, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_body(level: str, dtype: torch.dtype) -> None:
    """On slices of a fused projection, which are read where they are."""
    spec, rotary, norms = make_spec(8, 2, 64), RopeSpec(head_dim=64, rotary_dim=64), norms_of(64, dtype)
    case = Case(spec, MIXED, dtype)
    qkv = torch.randn(case.batch.num_tokens, 12, 64).to(dtype)
    kept = qkv.clone()
    positions, table = torch.arange(qkv.shape[0], dtype=torch.int32), torch.randn(100, 64)
    before = [leaf.clone() for leaf in case.pool.leaves]
    args = *qkv.split((8, 2, 2), dim=1), positions, table, rotary, case.pool, 1, spec
    plan = OPS["attn.plan"].body(spec, case.batch, torch.device("cpu"))
    want, want_lse = OPS["attn.rope_paged"].body(*args, plan, head_norms=norms, lse=True)
    for leaf, old in zip(case.pool.leaves, before, strict=True):
        leaf.copy_(old)
    own = attention_plan.plan(spec, case.batch, torch.device("cpu"))
    got, lse = rope_paged.rope_paged(*args, own, head_norms=norms, lse=True)
    assert_close(got, want, scale=8)
    torch.testing.assert_close(lse, want_lse, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-4)
    assert torch.equal(qkv, kept)
