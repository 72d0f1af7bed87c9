"""Latent attention over a pool of latents: kinds of steps, and what the pool may store."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from torch import Tensor

from sglang_conformance.case import HALVES, Case, Outputs, add
from sglang_conformance.cases.kv_step import CHUNK, DECODE, MIXED, PREFILL, TREES, Layer, Step, add_steps
from sglang_conformance.cases.rows import Rows, Run, add_rows
from sglang_conformance.env import Env
from sglang_core.ops.attention import AttnSpec
from sglang_core.ops.mla import MLASpec


def spec_of(heads: int = 8, rank: int = 64, rope: int = 32, scale: float = 0.15, **more: Any) -> MLASpec:
    return MLASpec(num_heads=heads, rank=rank, nope_dim=32, rope_dim=rope, v_head_dim=32, scale=scale, **more)


class LatentLayer(Layer):
    op = "attn.mla_paged"
    covers = ("attn.mla_plan", "kv.write_mla")

    def __init__(self, env: Env, spec: MLASpec | None = None, page_size: int = 16) -> None:
        self.spec = spec or spec_of()
        super().__init__(env, self.spec, page_size)

    def stored(self) -> tuple[Literal["full", "mla"], AttnSpec]:
        """Keys of `rank` dims and values of `rope_dim`, of one head."""
        like = AttnSpec(num_heads=1, num_kv_heads=1, head_dim=self.spec.rank, v_head_dim=self.spec.rope_dim, scale=1.0)
        return "mla", replace(like, kv_dtype=self.spec.kv_dtype, tree=self.spec.tree)

    def inputs(self, tokens: int) -> tuple[Tensor, ...]:
        s = self.spec
        shapes = ((s.num_heads, s.rank), (s.num_heads, s.rope_dim), (s.rank,), (s.rope_dim,))
        return tuple(self.env.normal(tokens, *shape) for shape in shapes)

    def without_new(self, inputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return *inputs[:2], None, None

    def __call__(self, step: Step, *inputs: Tensor | None, lse: bool = False) -> Any:
        plan = self.ops["attn.mla_plan"](self.spec, step.batch, self.env.device)
        return self.ops["attn.mla_paged"](*inputs, step.pool, step.layer, self.spec, plan, lse=lse)

    def write(self, step: Step, *inputs: Tensor) -> None:
        slots = self.env.place(step.batch.slot_mapping_cpu)
        self.ops["kv.write_mla"](*inputs[2:], step.pool, step.layer, slots)


def project(env: Env) -> Outputs:
    """Queries into latent space, and results out of it: the weight is a view there."""
    dims = {"Hq": 8, "D": 96}
    op = env.op("attn.mla_project", spec=spec_of(), dims=dims)
    into, out = env.normal(8, 32, 64, scale=0.2), env.normal(8, 32, 64, scale=0.2).transpose(1, 2)
    return {"into": op(env.normal(5, 8, 32), into), "out of": op(env.normal(5, 8, 64), out)}


def project_rows(env: Env, rows: int, sizes: tuple[int, int, int] = (8, 32, 64)) -> tuple[Rows, Run]:
    heads, width, out = sizes
    op = env.op("attn.mla_project", spec=spec_of(), dims={"Hq": heads, "D": width + out})
    weight = env.normal(heads, width, out, scale=0.2)
    return {"x": env.normal(rows, heads, width)}, lambda given: {"y": op(given["x"], weight)}


add_latent = partial(add_steps, LatentLayer)


add_latent("decode", DECODE)
add_latent("prefill", PREFILL)
add_latent("chunked prefill", CHUNK)
add_latent("mixed", MIXED)
add_latent("already written", MIXED, written=True)
add_latent("one req of one token", [(0, 1)])
add_latent("empty extends", [(5, 0), (30, 1), (0, 4), (64, 0)])
add_latent("a full page", [(15, 1), (16, 16), (0, 16), (48, 16)])
add_latent("no tokens", [(5, 0), (16, 0)])
add_latent("rank 512, 16 heads", [(200, 1), (0, 9)], spec_of(16, 512, 64, 0.05))
# Scores of some hundreds: their exponentials overflow float32.
add_latent("large scores", MIXED, spec_of(scale=20.0))
add_latent("page of 64", MIXED, page_size=64)
add_latent("page of 1", MIXED, profile="odd_sizes", page_size=1)
add_latent("odd sizes", MIXED, spec_of(3, 24, 8), profile="odd_sizes")
add_latent("sliced", MIXED, strides=16)
add_latent("sliced at odd places", MIXED, strides=3, profile="odd_sizes")
add_latent("tree", TREES, spec_of(tree=True), profile="tree")
add_latent("fp8_e4m3 latents", MIXED, spec_of(kv_dtype="fp8_e4m3"), profile="kv_fp8")
add_latent("int8 latents", MIXED, spec_of(kv_dtype="int8"), profile="kv_int8")
add_latent("padded decode", DECODE, padding=3, profile="buckets")
add_latent("padded mixed", MIXED, padding=5, profile="buckets")
add_latent("a context of 8191", [(8190, 1), (4000, 3)], spec_of(4, scale=0.1), page_size=64, full=True)
for kv_dtype, profile in {"auto": "core", "fp8_e4m3": "kv_fp8", "int8": "kv_int8"}.items():
    add_latent(
        f"slots past 2^31 elements, {kv_dtype} pool",
        [(40, 2), (70, 1)],
        spec_of(4, 512, 64, 0.05, kv_dtype=kv_dtype),
        profile=profile,  # type: ignore[arg-type]
        dtypes=HALVES,
        full=True,
        far=True,
    )
add(Case(op="attn.mla_project", name="into and out of latent space", run=project))
add_rows("attn.mla_project", project_rows, odd=lambda env, rows: project_rows(env, rows, (3, 37, 21)))
