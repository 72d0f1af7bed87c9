"""Attention over a pool of keys and values: kinds of steps, masks and what a pool may store."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.cases.kv_step import CHUNK, DECODE, MIXED, PREFILL, TREES, Layer, Reqs, Step, add_steps, new_kv
from sglang_conformance.env import Env
from sglang_core.ops.attention import AttnSpec


def spec_of(heads: int = 8, kv_heads: int = 2, dim: int = 64, **more: Any) -> AttnSpec:
    facts = {"scale": 1.5 * dim**-0.5, "v_head_dim": dim} | more  # peakier than usual: mistakes show more
    return AttnSpec(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, **facts)


class FullLayer(Layer):
    op = "attn.paged"
    covers = ("attn.plan", "kv.write")

    def __init__(self, env: Env, spec: AttnSpec | None = None, page_size: int = 16) -> None:
        self.spec = spec or spec_of()
        super().__init__(env, self.spec, page_size)
        self.sinks = {"sinks": env.normal(self.spec.num_heads)} if self.spec.has_sinks else {}

    def stored(self) -> tuple[Literal["full", "mla"], AttnSpec]:
        return "full", self.spec

    def inputs(self, tokens: int) -> tuple[Tensor, ...]:
        return self.env.normal(tokens, self.spec.num_heads, self.spec.head_dim), *new_kv(self.env, self.spec, tokens)

    def without_new(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return inputs[0], None, None

    def __call__(self, step: Step, *inputs: Tensor | None, lse: bool = False) -> Any:
        plan = self.ops["attn.plan"](self.spec, step.batch, self.env.device)
        return self.ops["attn.paged"](*inputs, step.pool, step.layer, self.spec, plan, **self.sinks, lse=lse)

    def write(self, step: Step, *inputs: Tensor) -> None:
        slots = self.env.place(step.batch.slot_mapping_cpu)
        self.ops["kv.write"](*inputs[1:], step.pool, step.layer, slots)


add_paged = partial(add_steps, FullLayer)


CROSS: Reqs = [(50, 1), (1, 20), (0, 2), (300, 130)]  # (keys of an encoder, queries) each
CAPPED = {"soft_cap": 2.0, "has_sinks": True}


def cross(env: Env, lens: Reqs) -> Outputs:
    layer = FullLayer(env, spec_of(causal=False, cross=True))
    step = layer.step([(keys, 0) for keys, _ in lens])
    queries = torch.tensor([0] + [n for _, n in lens])
    total = int(queries.sum())
    batch = replace(
        step.batch,
        cu_extend_cpu=queries.cumsum(0).to(torch.int32),
        slot_mapping_cpu=torch.zeros(total, dtype=torch.int32),
        num_tokens=total,
        max_extend=int(queries.max()),
    )
    o, lse = layer(replace(step, batch=batch), layer.inputs(total)[0], None, None, lse=True)
    scratch = torch.arange(16, dtype=torch.int32)
    return {"o": o, "lse": lse, "scratch": step.pool.gather(step.layer, env.place(scratch))[0]}


add_paged("decode", DECODE)
add_paged("prefill", PREFILL)
add_paged("chunked prefill", CHUNK)
add_paged("mixed", MIXED)
add_paged("already written", MIXED, written=True)
add_paged("one req of one token", [(0, 1)])
add_paged("long decode", [(3000, 1), (1, 1)])
add_paged("many reqs", [(7 * i, 1) for i in range(33)])
add_paged("head dim 128", MIXED, spec_of(4, 4, 128))
add_paged("one KV head", MIXED, spec_of(8, 1))
# Scores of some hundreds: their exponentials overflow float32, or vanish.
add_paged("large scores", MIXED, spec_of(scale=20.0))
add_paged("not causal", CHUNK, spec_of(causal=False), profile="odd_sizes")
add_paged("page of 64", MIXED, page_size=64)
add_paged("page of 1", MIXED, profile="odd_sizes", page_size=1)
add_paged("odd head dims", MIXED, spec_of(6, 3, 24, v_head_dim=40), profile="odd_sizes")
for window in (1, 16, 50):
    add_paged(f"window {window}", MIXED, spec_of(window=window), profile="window")
add_paged("window, long decode", [(2000, 1), (17, 1)], spec_of(window=100), profile="window")
add_paged("soft cap", MIXED, spec_of(soft_cap=2.0), profile="soft_cap")
add_paged("soft cap and window", MIXED, spec_of(soft_cap=2.0, window=33), profile="soft_cap")
add_paged("sinks", MIXED, spec_of(has_sinks=True), profile="sinks")
add_paged("sinks and window", MIXED, spec_of(has_sinks=True, window=40), profile="sinks")
add_paged("tree", TREES, spec_of(tree=True), profile="tree")
add_paged("tree, window, soft cap and sinks", TREES, spec_of(tree=True, window=3, **CAPPED), profile="tree")
add_paged("padded tree", TREES, spec_of(tree=True, window=20), padding=3, profile="tree")
add_paged("bfloat16 keys", MIXED, spec_of(kv_dtype="bfloat16"), profile="kv_half")
add_paged("float16 keys", MIXED, spec_of(kv_dtype="float16"), profile="kv_half")
for name in ("fp8_e4m3", "int8"):
    profile: Profile = "kv_fp8" if name == "fp8_e4m3" else "kv_int8"
    add_paged(f"{name} keys", MIXED, spec_of(kv_dtype=name), profile=profile)
    add_paged(
        f"{name} keys, window and soft cap", MIXED, spec_of(kv_dtype=name, window=33, soft_cap=2.0), profile=profile
    )
    add_paged(f"{name} keys, padded decode", DECODE, spec_of(kv_dtype=name), padding=3, profile=profile)
add_paged("padded decode", DECODE, padding=3, profile="buckets")
add_paged("padded mixed", MIXED, padding=5, profile="buckets")
add(Case(op="attn.paged", name="cross", run=lambda env: cross(env, CROSS), profile="cross", exact=("scratch",)))
# An encoder may have given nothing: no key is seen, and its queries get zeros.
add(
    Case(
        op="attn.paged",
        name="cross, no keys",
        run=lambda env: cross(env, [(0, 3), (20, 2), (0, 1)]),
        profile="cross",
        exact=("scratch",),
    )
)
