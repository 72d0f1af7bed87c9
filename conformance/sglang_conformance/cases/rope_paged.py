"""What an attention layer does between its projections as one op: rotations, head norms, kinds of steps, and what a pool may store."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sglang_conformance.case import HALVES, Profile
from sglang_conformance.cases.attention import CAPPED, FullLayer, spec_of
from sglang_conformance.cases.kv_step import CHUNK, DECODE, MIXED, PREFILL, TREES, Reqs, Step, add_steps
from sglang_conformance.env import ROPE_PAGED, Env, Op
from sglang_core.ops.attention import AttnSpec
from sglang_core.ops.mla import MLASpec
from sglang_core.ops.rope import RopeSpec, rope_table
from sglang_core.ops.rope_paged import HeadNorms

LENGTH = 4096


class RopedLayer(FullLayer):
    """`rotary`: facts of its RopeSpec; all dims are rotated by default. `norms`: the dtype of its head norms' weights, if it has any."""

    op = ROPE_PAGED
    covers = ("attn.plan",)
    exact = ("pool_v",)  # a rotated key is rounded: its last bit is open

    def __init__(
        self,
        env: Env,
        spec: AttnSpec | None = None,
        page_size: int = 16,
        *,
        norms: str = "",
        **rotary: Any,
    ) -> None:
        dim = (spec or spec_of()).head_dim
        self.rotary, self.normed = RopeSpec(head_dim=dim, **({"rotary_dim": dim} | rotary)), bool(norms)
        super().__init__(env, spec, page_size)
        self.table = env.place(rope_table(self.rotary, LENGTH))
        self.head_norms = None
        if norms:
            q, k = (env.normal(dim, mean=1.0, scale=0.3) for _ in range(2))
            if norms == "float32":
                q, k = (env.place(x.float().cpu() + 1e-3) for x in (q, k))
            self.head_norms = HeadNorms(q, k, 1e-5)

    def bound(self, spec: AttnSpec | MLASpec) -> dict[str, Op]:
        return self.env.paged_ops(spec, self.page_size, self.rotary, normed=self.normed)

    def __call__(self, step: Step, *inputs: Tensor | None, lse: bool = False) -> Any:
        plan = self.ops["attn.plan"](self.spec, step.batch, self.env.device)
        at = self.env.place(self.positions(step)), self.table, self.rotary
        facts = {"head_norms": self.head_norms, **self.sinks}
        return self.ops[ROPE_PAGED](*inputs, *at, step.pool, step.layer, self.spec, plan, **facts, lse=lse)

    def positions(self, step: Step) -> Tensor:
        """int32[T]: each token's place in its req; zeros of padding."""
        b = step.batch
        ranges = zip(b.prefix_lens_cpu.tolist(), b.seq_lens_cpu.tolist(), strict=True)
        every = torch.cat([torch.arange(start, stop, dtype=torch.int32) for start, stop in ranges])
        return torch.nn.functional.pad(every, (0, b.num_tokens - len(every)))


class UnturnedLayer(RopedLayer):
    """All tokens are at position 0, so that keys are what they were: what the pool makes of them is compared bit for bit."""

    exact = ("pool_k", "pool_v")

    def positions(self, step: Step) -> Tensor:
        return torch.zeros(step.batch.num_tokens, dtype=torch.int32)


def add(
    name: str,
    reqs: Reqs,
    spec: AttnSpec | None = None,
    page_size: int = 16,
    *,
    layer: type[RopedLayer] = RopedLayer,
    **more: Any,
) -> None:
    """A case of one step. `norms` and what a RopeSpec has are for its layer, the rest is for the case and its run."""
    of_layer = {name: more.pop(name) for name in ("norms", "rotary_dim", "style") if name in more}
    add_steps(layer, name, reqs, spec, page_size, of_layer=of_layer, **more)


add("decode", DECODE)
add("prefill", PREFILL)
add("chunked prefill", CHUNK)
add("mixed", MIXED)
add("no tokens", [(5, 0)])
add("one req of one token", [(0, 1)])
add("page of 64", MIXED, page_size=64)
add("page of 1", MIXED, page_size=1, profile="odd_sizes")
add("one KV head", MIXED, spec_of(8, 1))
for dim in (80, 96, 128, 192, 256):
    add(f"head dim {dim}", MIXED, spec_of(4, 4, dim), norms="like x")
add("interleaved", MIXED, style="interleaved")
add("partial", MIXED, rotary_dim=32)
add("interleaved, partial", MIXED, style="interleaved", rotary_dim=32, norms="like x")
add("head norms", MIXED, norms="like x")
add("head norms, decode", DECODE, norms="like x")
add("head norms in float32", MIXED, norms="float32")
add("head norms, partial", MIXED, norms="like x", rotary_dim=16)
add("odd head dims", MIXED, spec_of(6, 3, 24, v_head_dim=40), rotary_dim=18, norms="like x", profile="odd_sizes")
for window in (16, 50):
    add(f"window {window}", MIXED, spec_of(window=window), profile="window")
add("soft cap", MIXED, spec_of(soft_cap=2.0), profile="soft_cap")
add("sinks", MIXED, spec_of(has_sinks=True), profile="sinks")
add("tree, window, soft cap and sinks", TREES, spec_of(tree=True, window=3, **CAPPED), profile="tree")
STORED: dict[str, Profile] = {"bfloat16": "kv_half", "float16": "kv_half", "fp8_e4m3": "kv_fp8", "int8": "kv_int8"}
for kv_dtype, profile in STORED.items():
    add(f"{kv_dtype} keys, no angles", MIXED, spec_of(kv_dtype=kv_dtype), layer=UnturnedLayer, profile=profile)
# The last bit of a rotated key may turn a code of it. Among these numbers there is none so near, or the body turns as many.
add("fp8_e4m3 keys", MIXED, spec_of(kv_dtype="fp8_e4m3"), norms="like x", profile="kv_fp8", dtypes=(torch.float32,))
add("int8 keys", MIXED, spec_of(kv_dtype="int8"), norms="like x", profile="kv_int8", dtypes=HALVES)
add("padded decode", DECODE, padding=3, profile="buckets")
add("padded mixed", MIXED, padding=5, norms="like x", profile="buckets")
add("sliced", MIXED, strides=16, norms="like x")
add("sliced at odd places", MIXED, spec_of(6, 3, 24), strides=3, profile="odd_sizes")
