"""Attention layers with a pool, and steps for them: the pool is NaN but for the tokens that live in it, its pages in random order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.env import Env, Op
from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.ops.attention import AttnBatch, AttnSpec
from sglang_core.ops.mla import MLASpec
from sglang_core.ops.tree_mask import tree_mask_of

Reqs = list[tuple[int, int]]  # (prefix, extend) each
DECODE: Reqs = [(99, 1), (0, 1), (15, 1), (16, 1), (700, 1)]
PREFILL: Reqs = [(0, 40), (0, 1), (0, 150)]
CHUNK: Reqs = [(256, 64), (30, 100)]
MIXED: Reqs = [(63, 1), (0, 70), (300, 1), (90, 33), (5, 2)]
TREES: Reqs = [(63, 7), (0, 40), (300, 1), (90, 33), (5, 2)]
NOTHING: Mapping[str, Any] = MappingProxyType({})
NEAR = 8  # pages at the beginning of a pool that an index which wrapped around leads to


@dataclass(frozen=True, kw_only=True)
class Step:
    """A batch in host integers, and the pool with every prefix written to layer `layer`."""

    batch: AttnBatch
    pool: Pool
    layer: int
    slots: list[Tensor]  # of each req's every token

    @property
    def new_slots(self) -> Tensor:
        """Where each token that is not padding goes."""
        return self.batch.slot_mapping_cpu[: int(self.batch.cu_extend_cpu[-1])]

    def part(self, start: int, stop: int) -> tuple[Step, slice]:
        """The step of the reqs [start, stop) alone, unpadded, and the rows of its tokens in the whole."""
        b = self.batch
        rows = slice(int(b.cu_extend_cpu[start]), int(b.cu_extend_cpu[stop]))
        lens = b.seq_lens_cpu[start:stop]
        cu = b.cu_extend_cpu[start : stop + 1] - b.cu_extend_cpu[start]
        pages = max(1, -(-int(lens.max()) // b.page_size))
        batch = replace(
            b,
            cu_extend_cpu=cu,
            prefix_lens_cpu=b.prefix_lens_cpu[start:stop],
            seq_lens_cpu=lens,
            page_table_cpu=b.page_table_cpu[start:stop, :pages],
            slot_mapping_cpu=b.slot_mapping_cpu[rows],
            num_tokens=rows.stop - rows.start,
            num_reqs=stop - start,
            max_extend=int(cu.diff().max()),
            num_pages=pages,
            static=False,
        )
        return replace(self, batch=batch), rows


class Layer(ABC):
    """One layer's ops, bound. Called with a step and its inputs, packed over the tokens, it attends."""

    op: str
    covers: tuple[str, ...]  # ops that its steps call, too
    exact: tuple[str, ...] = ("pool_k", "pool_v")  # outputs of `run` about which nothing is open

    def __init__(self, env: Env, spec: AttnSpec | MLASpec, page_size: int) -> None:
        self.env, self.page_size = env, page_size
        self.ops = self.bound(spec)

    def bound(self, spec: AttnSpec | MLASpec) -> dict[str, Op]:
        """Its ops: those that share its pool."""
        return self.env.paged_ops(spec, self.page_size)

    @abstractmethod
    def stored(self) -> tuple[Literal["full", "mla"], AttnSpec]:
        """The kind of its pool, and attention whose keys and values look like what the pool holds."""

    @abstractmethod
    def inputs(self, tokens: int) -> tuple[Tensor, ...]:
        """Queries, and what the step adds to the pool."""

    @abstractmethod
    def __call__(self, step: Step, *inputs: Tensor | None, lse: bool = False) -> Any:
        """o, or (o, lse). Where what the step adds is None, it is in the pool already."""

    @abstractmethod
    def write(self, step: Step, *inputs: Tensor) -> None:
        """What the step adds goes to the pool, and nothing else happens."""

    def step(self, reqs: Reqs, *, padding: int = 0, far: bool = False) -> Step:
        kind, spec = self.stored()
        return make_step(self.env, spec, reqs, self.page_size, kind=kind, padding=padding, far=far)

    def run(
        self, reqs: Reqs, *, padding: int = 0, far: bool = False, written: bool = False, strides: int = 0
    ) -> Outputs:
        """One step, twice. `written`: what it adds is in the pool already. `strides`: inputs are slices, so many elements in."""
        step = self.step(reqs, padding=padding, far=far)
        inputs = self.inputs(step.batch.num_tokens)
        if strides:
            inputs = tuple(self.env.sliced(x, strides) for x in inputs)
        if written:
            self.write(step, *inputs)
            inputs = self.without_new(inputs)
        first, again = (self(step, *inputs) for _ in range(2))
        o, lse = self(step, *inputs, lse=True)
        assert torch.equal(first.nan_to_num(), again.nan_to_num()), "a step run twice must give the same bits"
        pool_k, pool_v = step.pool.gather(step.layer, self.env.place(step.new_slots))
        return {"o": first, "o, with lse": o, "lse": lse, "pool_k": pool_k, "pool_v": pool_v}

    @abstractmethod
    def without_new(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The inputs with None for what the step would add."""

    def writes(self, reqs: Reqs, *, strides: int = 0) -> Outputs:
        """Every slot that is written, and none of its neighbours, in any layer."""
        step = self.step(reqs)
        inputs = self.inputs(step.batch.num_tokens)
        self.write(step, *(self.env.sliced(x, strides) if strides else x for x in inputs))
        every = torch.arange(step.pool.num_pages * self.page_size, dtype=torch.int32)
        outputs = {}
        for layer in range(step.pool.spec.num_layers):
            outputs[f"k{layer}"], outputs[f"v{layer}"] = step.pool.gather(layer, self.env.place(every))
        return outputs


def add_steps(
    layer: type[Any],
    name: str,
    reqs: Reqs,
    spec: Any = None,
    page_size: int = 16,
    *,
    profile: Profile = "core",
    full: bool = False,
    dtypes: tuple[torch.dtype, ...] | None = None,
    of_layer: Mapping[str, Any] = NOTHING,
    **more: Any,
) -> None:
    """A case of one step of a `Layer`. `of_layer` is for its constructor, `more` for its `run`."""
    add(
        Case(
            op=layer.op,
            name=name,
            run=lambda env: layer(env, spec, page_size, **of_layer).run(reqs, **more),
            profile=profile,
            exact=layer.exact,
            covers=layer.covers,
            full=full,
            **({} if dtypes is None else {"dtypes": dtypes}),
        )
    )


STORED = ("k0", "v0", "k1", "v1")  # outputs of `writes`


def make_step(
    env: Env,
    spec: AttnSpec,
    reqs: Reqs,
    page_size: int,
    *,
    kind: Literal["full", "mla"] = "full",
    padding: int = 0,
    far: bool = False,
) -> Step:
    """`padding` more reqs and tokens than there are, as in a bucket. With `spec.tree` a req's new tokens are a binary tree.

    `far`: slot times width does not fit 32 bits. Most of such a pool is never touched. The oracle and the body look at the same
    numbers in a small one.
    """
    lens = [prefix + extend for prefix, extend in reqs]
    counts = [-(-n // page_size) for n in lens]
    first = 1 + (env.far(2**31 // (page_size * spec.num_kv_heads * spec.head_dim)) if far else 0)
    pool_spec = PoolSpec(
        kind=kind,
        num_layers=1 if far else 2,
        page_size=page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        v_head_dim=spec.v_head_dim,
        dtype=KV_DTYPES.get(spec.kv_dtype, env.dtype),
    )
    layer, num_pages = pool_spec.num_layers - 1, first + sum(counts)
    pool = env.pool(pool_spec, num_pages, poisoned=False)
    pool.poison([*range(min(NEAR, first)), *range(first, num_pages)])
    if pool_spec.scaling == "static":
        k_scale, v_scale = (env.integers(8, 100, spec.num_kv_heads).float() / 4096 for _ in range(2))
        pool.set_scales(layer, k_scale, v_scale)
    table = torch.zeros(len(reqs) + padding, max(counts, default=0) + padding, dtype=torch.int32)
    slots = []
    for r, pages in enumerate((env.permutation(sum(counts)) + first).split(counts) if counts else ()):
        table[r, : len(pages)] = pages
        slots.append((pages[:, None] * page_size + torch.arange(page_size, dtype=torch.int32)).flatten()[: lens[r]])
    for r, ((prefix, _), own) in enumerate(zip(reqs, slots, strict=True)):
        pool.scatter(layer, env.place(own[:prefix]), *new_kv(env, spec, prefix))
        if spec.window is not None:  # the core has let go of pages before it: the table names scratch there
            table[r, : max(0, prefix - spec.window) // page_size] = 0
    extends = torch.tensor([0] + [extend for _, extend in reqs] + [0] * padding)
    total = int(extends.sum())
    new_slots = [own[prefix:] for (prefix, _), own in zip(reqs, slots, strict=True)]
    none = torch.zeros(padding, dtype=torch.int32)
    batch = AttnBatch(
        cu_extend_cpu=extends.cumsum(0).to(torch.int32),
        prefix_lens_cpu=torch.tensor([p for p, _ in reqs] + [0] * padding, dtype=torch.int32),
        seq_lens_cpu=torch.tensor(lens + [0] * padding, dtype=torch.int32),
        page_table_cpu=table,
        slot_mapping_cpu=torch.cat([*new_slots, none]),
        num_tokens=total + padding,
        num_reqs=len(reqs) + padding,
        max_extend=int(extends.max()),
        num_pages=table.shape[1],
        page_size=page_size,
        static=padding > 0,
        tree_mask_cpu=_binary_trees(extends[1:].tolist(), padding) if spec.tree else None,
    )
    return Step(batch=batch, pool=pool, layer=layer, slots=slots)


def _binary_trees(sizes: list[int], padding: int) -> Tensor:
    """int32[T, W]; the children of token i are 2i + 1 and 2i + 2."""
    mask = tree_mask_of([[(i - 1) // 2 if i else -1 for i in range(size)] for size in sizes])
    return torch.cat([mask, mask.new_zeros(padding, mask.shape[1])])


def new_kv(env: Env, spec: AttnSpec, tokens: int) -> tuple[Tensor, Tensor]:
    return env.normal(tokens, spec.num_kv_heads, spec.head_dim), env.normal(tokens, spec.num_kv_heads, spec.v_head_dim)
