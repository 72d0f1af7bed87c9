from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import BATCHES, CPU, DTYPES, Case
from sglang_xeon import attention, attention_plan
from torch import Tensor

from sglang_core.api.ops import OPS, MLASpec

QUANTISED = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def make_spec(heads: int = 16, rank: int = 128, rope: int = 32, **facts) -> MLASpec:
    return MLASpec(num_heads=heads, rank=rank, nope_dim=32, rope_dim=rope, v_head_dim=32, scale=0.08, **facts)


class LatentCase(Case):
    kind = "mla"
    paged, plan = staticmethod(attention.mla_paged), staticmethod(attention_plan.plan)
    body, body_plan = staticmethod(OPS["attn.mla_paged"].body), staticmethod(OPS["attn.mla_plan"].body)

    @property
    def k_dims(self) -> tuple[int, int]:
        return 1, self.spec.rank

    @property
    def v_dims(self) -> tuple[int, int]:
        return 1, self.spec.rope_dim

    def make_new(self, tokens: int) -> tuple[Tensor, ...]:
        """q_nope and q_pe, c_kv and k_pe: views of one projection each, as the layer has them."""
        spec = self.spec
        q = torch.randn(tokens, spec.num_heads, spec.rank + spec.rope_dim).to(self.dtype)
        kv = torch.randn(tokens, spec.rank + spec.rope_dim).to(self.dtype)
        return (*q.split([spec.rank, spec.rope_dim], dim=-1), *kv.split([spec.rank, spec.rope_dim], dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reqs", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("heads, rank, rope", [(16, 128, 32), (1, 64, 64), (3, 24, 8), (100, 32, 16), (5, 14, 7)])
def test_latents_are_the_body(
    level: str, dtype: torch.dtype, reqs: list[tuple[int, int]], heads: int, rank: int, rope: int
) -> None:
    LatentCase(make_spec(heads, rank, rope), reqs, dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_that_models_have(level: str, dtype: torch.dtype) -> None:
    LatentCase(make_spec(16, 512, 64), [(700, 1), (64, 1), (20, 9)], dtype, page_size=64).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", QUANTISED.values(), ids=QUANTISED)
def test_latents_in_codes(level: str, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """The latent and the rotated key have scales of their own."""
    for reqs in BATCHES.values():
        LatentCase(make_spec(), reqs, dtype, kv_dtype=kv_dtype).check()


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_long_range_of_latents_is_split(level: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        LatentCase(make_spec(20, 32, 16), [(3000, 1), (5, 1), (5000, 3)], torch.float32, page_size=16).check()
    finally:
        torch.set_num_threads(before)


def test_trees_over_latents(level: str) -> None:
    trees = [[(i - 1) // 2 if i else -1 for i in range(n)] for n in (7, 40, 1, 33)]
    reqs = [(63, 7), (0, 40), (300, 1), (90, 33)]
    LatentCase(make_spec(tree=True), reqs, torch.bfloat16, trees=trees).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_alone_give_the_bits_they_give_in_a_batch(level: str, dtype: torch.dtype) -> None:
    spec = make_spec()
    case = LatentCase(spec, [(1100, 1), (40, 30), (0, 1)], dtype, page_size=16)
    b = case.batch
    whole = attention.mla_paged(*case.new, case.pool, 1, spec, attention_plan.plan(spec, b, CPU))
    for r in range(3):
        rows, one = slice(int(b.cu_extend_cpu[r]), int(b.cu_extend_cpu[r + 1])), slice(r, r + 1)
        extend = rows.stop - rows.start
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
        queries = (case.new[0][rows], case.new[1][rows])
        assert torch.equal(attention.mla_paged(*queries, None, None, case.pool, 1, spec, plan), whole[rows])
