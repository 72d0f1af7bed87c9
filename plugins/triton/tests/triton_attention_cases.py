"""Steps over pools that are NaN but for what lives in them, and the op's body beside the kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sglang_triton import attention, attention_plan
from torch import Tensor
from triton_tolerance import assert_close

from sglang_core.api import Pool, PoolSpec
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec, MLASpec

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KV_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
Reqs = list[tuple[int, int]]  # (prefix, extend) each
BATCHES: dict[str, Reqs] = {
    "decode": [(37, 1), (0, 1), (290, 1), (127, 1)],
    "prefill": [(0, 5), (0, 1), (0, 70)],
    "mixed": [(300, 1), (0, 30), (3, 1), (40, 17)],
}


def spec_of(heads: int = 3, kv_heads: int = 1, dim: int = 32, **facts: Any) -> AttnSpec:
    return AttnSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, **({"v_head_dim": dim, "scale": dim**-0.5} | facts)
    )


def latent_spec(heads: int = 4, **facts: Any) -> MLASpec:
    return MLASpec(num_heads=heads, rank=32, nope_dim=16, rope_dim=16, v_head_dim=16, scale=0.2, **facts)


class Case:
    """One step: reqs with prefixes in pages of random order, and this step's inputs, which are views that lie apart."""

    def __init__(
        self,
        spec: AttnSpec | MLASpec,
        reqs: Reqs,
        dtype: torch.dtype = torch.float32,
        *,
        page_size: int = 16,
        kv_dtype: torch.dtype | None = None,
        padding: int = 0,
        tree_mask: Tensor | None = None,
    ) -> None:
        self.spec, self.dtype = spec, dtype
        latent = isinstance(spec, MLASpec)
        self.op, self.plan_op = ("attn.mla_paged", "attn.mla_plan") if latent else ("attn.paged", "attn.plan")
        self.kernel: Callable[..., Any] = attention.mla_paged if latent else attention.paged
        self.plans: tuple[Callable[..., Any], ...] = (attention_plan.plan, attention_plan.plan_invariant)
        lens = [prefix + extend for prefix, extend in reqs]
        pages = [-(-n // page_size) for n in lens]
        self.pool = Pool(
            PoolSpec(
                kind="mla" if latent else "full",
                num_layers=2,
                page_size=page_size,
                num_kv_heads=1 if latent else spec.num_kv_heads,
                head_dim=spec.rank if latent else spec.head_dim,
                v_head_dim=spec.rope_dim if latent else spec.v_head_dim,
                dtype=kv_dtype or dtype,
            ),
            sum(pages) + 1,
            CPU,
        )
        self.pool.poison(range(self.pool.num_pages))
        self.stored = self.pool.spec
        if self.stored.scaling == "static":
            self.pool.set_scales(1, *(torch.rand(2, self.stored.num_kv_heads) / 64 + 1 / 256))
        table = torch.zeros(len(reqs) + padding, max(pages) + 1, dtype=torch.int32)
        new_slots = [torch.zeros(padding, dtype=torch.int32)]
        for r, own in enumerate((torch.randperm(sum(pages)) + 1).int().split(pages)):
            prefix = reqs[r][0]
            slots = (own[:, None] * page_size + torch.arange(page_size, dtype=torch.int32)).flatten()[: lens[r]]
            new_slots.insert(-1, slots[prefix:])
            table[r, : pages[r]] = own
            self.pool.scatter(1, slots[:prefix], *self.new_kv(prefix))
            window = None if latent else spec.window
            if window is not None:  # the core has let go of pages before it: the table names scratch there
                table[r, : max(0, prefix - window) // page_size] = 0
        extends = torch.tensor([0] + [extend for _, extend in reqs] + [0] * padding)
        total = int(extends.sum())
        none = torch.zeros(padding, dtype=torch.int32)
        self.batch = AttnBatch(
            cu_extend_cpu=extends.cumsum(0).int(),
            prefix_lens_cpu=torch.cat([torch.tensor([p for p, _ in reqs]).int(), none]),
            seq_lens_cpu=torch.cat([torch.tensor(lens).int(), none]),
            page_table_cpu=table,
            slot_mapping_cpu=torch.cat(new_slots),
            num_tokens=total + padding,
            num_reqs=len(reqs) + padding,
            max_extend=int(extends.max()),
            num_pages=table.shape[1],
            page_size=page_size,
            static=padding > 0,
            tree_mask_cpu=tree_mask,
        )
        tokens = total + padding
        if latent:
            q = self.apart(tokens, spec.num_heads, spec.rank), self.apart(tokens, spec.num_heads, spec.rope_dim)
            c_kv, k_pe = self.new_kv(tokens)
            self.new: tuple[Tensor, ...] = (*q, c_kv[:, 0], k_pe[:, 0])
        else:
            self.new = (self.apart(tokens, spec.num_heads, spec.head_dim), *self.new_kv(tokens))

    def apart(self, *shape: int) -> Tensor:
        """A slice of a wider tensor of NaN."""
        wide = torch.full((shape[0], shape[1] + 3, shape[2]), float("nan"))
        wide[:, 1 : 1 + shape[1]] = torch.randn(shape)
        return wide.to(self.dtype)[:, 1 : 1 + shape[1]]

    def new_kv(self, tokens: int) -> tuple[Tensor, Tensor]:
        s = self.stored
        return self.apart(tokens, s.num_kv_heads, s.head_dim), self.apart(tokens, s.num_kv_heads, s.v_head_dim)

    def run(self, plan: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        plan = plan or attention_plan.plan(self.spec, self.batch, CPU)
        return self.kernel(*self.new, self.pool, 1, self.spec, plan, lse=True, **kwargs)  # type: ignore[no-any-return]

    def check(self, **kwargs: Any) -> None:
        """The kernel is the body, under its plans, with and without an lse, and with keys that are there already."""
        clones = [leaf.clone() for leaf in self.pool.leaves]
        plan = OPS[self.plan_op].body(self.spec, self.batch, CPU)
        want, want_lse = OPS[self.op].body(*self.new, self.pool, 1, self.spec, plan, lse=True, **kwargs)
        written, self.pool.leaves = self.pool.leaves, clones
        for make in self.plans:
            got, lse = self.run(make(self.spec, self.batch, CPU), **kwargs)
            # In half types weights are rounded too, each by itself: off by as much as the result's own rounding, of the size of
            # what is summed and not of what remains.
            assert_close(got, want, scale=4.0)
            torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=2e-5)
        for mine, theirs in zip(self.pool.leaves, written, strict=True):
            assert torch.equal(bits(mine), bits(theirs))
        plan = make(self.spec, self.batch, CPU)
        again = self.kernel(*self.new[:-2], None, None, self.pool, 1, self.spec, plan, **kwargs)
        assert torch.equal(again, got)

    def alone(self, r: int) -> tuple[AttnBatch, slice]:
        """The batch of one req, and the rows of its tokens."""
        b = self.batch
        rows = slice(int(b.cu_extend_cpu[r]), int(b.cu_extend_cpu[r + 1]))
        count = rows.stop - rows.start
        batch = replace(
            b,
            cu_extend_cpu=torch.tensor([0, count], dtype=torch.int32),
            prefix_lens_cpu=b.prefix_lens_cpu[r : r + 1],
            seq_lens_cpu=b.seq_lens_cpu[r : r + 1],
            page_table_cpu=b.page_table_cpu[r : r + 1],
            slot_mapping_cpu=b.slot_mapping_cpu[rows],
            num_tokens=count,
            num_reqs=1,
            max_extend=count,
            static=False,
        )
        return batch, rows


def bits(x: Tensor) -> Tensor:
    """Whatever it holds, comparable; NaN of any bits is one."""
    return torch.where(x.float().isnan(), torch.full_like(x.float(), 1e30), x.float())
