"""Batches over pools that are NaN but for what lives in them, and the op's body beside the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from sglang_xeon import attention, attention_plan
from tolerance import assert_close
from torch import Tensor

from sglang_core.api import Pool, PoolSpec
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec

DTYPES = [torch.bfloat16, torch.float32]
CPU = torch.device("cpu")


def make_spec(heads: int = 4, kv_heads: int = 2, dim: int = 64, v_dim: int | None = None, **facts) -> AttnSpec:
    return AttnSpec(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, v_head_dim=v_dim or dim, scale=dim**-0.5, **facts
    )


class Case:
    """Reqs with prefixes in the pool, all else of the pool NaN, and this step's q, k, v."""

    kind: Literal["full", "mla"] = "full"
    paged, plan = staticmethod(attention.paged), staticmethod(attention_plan.plan)
    body, body_plan = staticmethod(OPS["attn.paged"].body), staticmethod(OPS["attn.plan"].body)

    def __init__(
        self,
        spec: Any,
        reqs: list[tuple[int, int]],
        dtype: torch.dtype,
        *,
        page_size: int = 4,
        kv_dtype=None,
        trees=None,
        shared: Sequence[tuple[Sequence[int], int]] = (),
    ) -> None:
        """trees: of each req, the parents of its new tokens. shared: reqs, and how many leading pages they have in common."""
        self.spec, self.dtype = spec, dtype
        lens = torch.tensor([p + e for p, e in reqs], dtype=torch.int32)
        pages = [-(-int(n) // page_size) for n in lens]
        order = (torch.randperm(sum(pages)) + 1).tolist()
        table = torch.zeros(len(reqs), max(pages, default=0) + 1, dtype=torch.int32)
        slots: list[int] = []
        for r, (prefix, extend) in enumerate(reqs):
            table[r, : pages[r]] = torch.tensor([order.pop() for _ in range(pages[r])], dtype=torch.int32)
            slots += [int(table[r, i // page_size]) * page_size + i % page_size for i in range(prefix, prefix + extend)]
        for members, count in shared:
            assert all(reqs[r][0] >= count * page_size for r in members), "a step writes no page that reqs share"
            table[list(members), :count] = table[members[0], :count].clone()
        self.pool = Pool(
            PoolSpec(
                kind=self.kind,
                num_layers=2,
                page_size=page_size,
                num_kv_heads=self.k_dims[0],
                head_dim=self.k_dims[1],
                v_head_dim=self.v_dims[1],
                dtype=kv_dtype or dtype,
            ),
            sum(pages) + 1,
            CPU,
        )
        self.pool.poison(range(self.pool.num_pages))
        if self.pool.spec.scaling == "static":
            self.pool.set_scales(1, *(torch.rand(2, self.k_dims[0]) / 64 + 1 / 256))
        for r, (prefix, _) in enumerate(reqs):
            at = torch.tensor([int(table[r, i // page_size]) * page_size + i % page_size for i in range(prefix)])
            k, v = torch.randn(prefix, *self.k_dims), torch.randn(prefix, *self.v_dims)
            self.pool.scatter(1, at.int(), k, v)
            if (
                getattr(spec, "window", None) is not None
            ):  # the core has let go of pages before it: the table names scratch there
                table[r, : max(0, prefix - spec.window) // page_size] = 0
        extends = [e for _, e in reqs]
        tokens = sum(extends)
        self.batch = AttnBatch(
            cu_extend_cpu=torch.tensor([0, *torch.tensor(extends).cumsum(0).tolist()], dtype=torch.int32),
            prefix_lens_cpu=torch.tensor([p for p, _ in reqs], dtype=torch.int32),
            seq_lens_cpu=lens,
            page_table_cpu=table,
            slot_mapping_cpu=torch.tensor(slots, dtype=torch.int32),
            num_tokens=tokens,
            num_reqs=len(reqs),
            max_extend=max(extends, default=0),
            num_pages=table.shape[1],
            page_size=page_size,
            tree_mask_cpu=None if trees is None else tree_mask_of(trees),
        )
        self.new = self.make_new(tokens)

    def make_new(self, tokens: int) -> tuple[Tensor, ...]:
        """q, k, v. A merged projection gives views: rows are not next to each other."""
        heads = self.spec.num_heads
        qkv = torch.randn(tokens, heads + self.spec.num_kv_heads, self.spec.head_dim).to(self.dtype)
        return qkv[:, :heads], qkv[:, heads:], torch.randn(tokens, *self.v_dims).to(self.dtype)

    @property
    def q(self) -> Tensor:
        return self.new[0]

    @property
    def k_dims(self) -> tuple[int, int]:
        return self.spec.num_kv_heads, self.spec.head_dim

    @property
    def v_dims(self) -> tuple[int, int]:
        return self.spec.num_kv_heads, self.spec.v_head_dim

    def check(self, **kwargs) -> None:
        clones = [leaf.clone() for leaf in self.pool.leaves]
        plan = self.body_plan(self.spec, self.batch, CPU)
        want, want_lse = self.body(*self.new, self.pool, 1, self.spec, plan, lse=True, **kwargs)
        want_leaves, self.pool.leaves = self.pool.leaves, clones
        plan = self.plan(self.spec, self.batch, CPU)
        got, got_lse = self.paged(*self.new, self.pool, 1, self.spec, plan, lse=True, **kwargs)
        # With VDPBF16PS weights are rounded to 8 bits too, each by itself: as far off as the result's own rounding, of the size of
        # what is summed and not of what remains.
        assert_close(got, want, scale=6.0)
        # One more exponential's error, and no rounding to the activations' dtype.
        torch.testing.assert_close(got_lse, want_lse, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(self.pool.leaves, want_leaves, strict=True):
            assert same_bits(mine, theirs)
        keys = [None] * 2
        again = self.paged(*self.new[:-2], *keys, self.pool, 1, self.spec, plan, **kwargs)
        assert torch.equal(again, got)


def tree_mask_of(trees: list[list[int]]) -> Tensor:
    """int32[T, W]: a bit for the token and for each of its ancestors."""
    words = -(-max(map(len, trees)) // 32)
    rows: list[int] = []
    for parents in trees:
        first = len(rows)
        for i, parent in enumerate(parents):
            rows.append(1 << i | (rows[first + parent] if parent >= 0 else 0))
    split = [[row >> (32 * w) & 0xFFFFFFFF for w in range(words)] for row in rows]
    return torch.tensor(split, dtype=torch.int64).to(torch.int32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equal to NaN."""
    a, b = a.float(), b.float()
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


BATCHES = {
    "decode": [(37, 1), (0, 1), (130, 1), (63, 1), (64, 1)],
    "prefill": [(0, 5), (0, 70), (0, 200)],
    "extend": [(20, 3), (64, 65), (7, 130)],
    "mixed": [(100, 1), (0, 50), (3, 1), (40, 17)],
}
