"""Relations between calls that hold whatever the numbers are. What a case asserts, the bodies keep as well.

Those of ops that treat every row alone are in `rows`. That a step run twice gives the same bits, and that the inputs of a call stay
as they are, holds for every case: the suite sees to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.cases.attention import FullLayer, spec_of
from sglang_conformance.cases.kv_step import DECODE, MIXED, Layer, Reqs
from sglang_conformance.cases.mla import LatentLayer
from sglang_conformance.cases.rope_paged import RopedLayer
from sglang_conformance.cases.rows import PADDED, TOGETHER
from sglang_conformance.env import Env
from sglang_conformance.guard import same_bits
from sglang_core.ops.attention import RaggedBatch

SHARED_PAGES = 3


def permuted_pages(layer: Layer, reqs: Reqs) -> Outputs:
    """The same keys and values in other pages, in another order: the same bits."""
    env, size = layer.env, layer.page_size
    step = layer.step(reqs)
    inputs = layer.inputs(step.batch.num_tokens)
    first = layer(step, *inputs)
    count = step.pool.num_pages
    new_page = torch.cat([torch.zeros(1, dtype=torch.int32), env.permutation(count - 1) + 1])
    old_slots = torch.arange(count * size, dtype=torch.int32)
    new_slots = (new_page[:, None] * size + torch.arange(size, dtype=torch.int32)).flatten()
    step.pool.move(env.place(old_slots), env.place(new_slots))
    moved = replace(
        step.batch,
        page_table_cpu=new_page[step.batch.page_table_cpu.long()],
        slot_mapping_cpu=new_slots[step.batch.slot_mapping_cpu.long()],
    )
    second = layer(replace(step, batch=moved), *inputs)
    assert same_bits(first, second), "a page's place in the pool must not change a bit"
    return {"o": second}


def shared_pages(layer: Layer) -> Outputs:
    """Reqs whose prefixes begin with the same pages, as after a hit in the prefix tree; one of them twice over."""
    size = layer.page_size
    shared = SHARED_PAGES * size
    step = layer.step([(shared + 5, 1), (shared, 20), (shared + 40, 3), (shared, 1), (9, 1)])
    table = step.batch.page_table_cpu
    table[1:4, :SHARED_PAGES] = table[0, :SHARED_PAGES]
    o, lse = layer(step, *layer.inputs(step.batch.num_tokens), lse=True)
    return {"o": o, "lse": lse}


def alone_and_together(layer: Layer, reqs: Reqs) -> Outputs:
    """Each req in a batch of its own, over the pool that all share: what its neighbours hold is not seen."""
    step = layer.step(reqs)
    inputs = layer.inputs(step.batch.num_tokens)
    together = layer(step, *inputs)
    alone = []
    for r in range(len(reqs)):
        own, rows = step.part(r, r + 1)
        alone.append(layer(own, *(x[rows] for x in inputs)))
    if layer.env.batch_invariant(layer.op):
        assert same_bits(torch.cat(alone), together), "it says batch_invariant, and a req's neighbours change its bits"
    return {"together": together, "alone": torch.cat(alone)}


def padded_or_not(layer: Layer, reqs: Reqs) -> Outputs:
    """A step in a bucket, whose padding rows hold NaN and then zeros, and the same step in none."""
    step = layer.step(reqs, padding=3)
    inputs = layer.inputs(step.batch.num_tokens)
    unpadded, rows = step.part(0, len(reqs))

    def padded(value: float) -> Tensor:
        given = tuple(x.clone() for x in inputs)
        for x in given:
            x[rows.stop :] = value
        return layer(step, *given)[rows]  # type: ignore[no-any-return]

    nan, zeros = padded(float("nan")), padded(0.0)
    plain = layer(unpadded, *(x[rows] for x in inputs))
    assert same_bits(nan, zeros), "what padding holds changes bits of other rows"
    if layer.env.batch_invariant(layer.op):
        assert same_bits(nan, plain), "it says batch_invariant, and padding changes bits"
    return {"padded": nan, "unpadded": plain}


def split_and_merged(env: Env) -> Outputs:
    """Attention over two halves of the keys, merged by their log-sum-exp, is attention over all."""
    spec = spec_of(causal=False)
    dims = {"Hq": spec.num_heads, "Hk": spec.num_kv_heads, "D": spec.head_dim}
    ragged, merge = env.op("attn.ragged", spec=spec, dims=dims), env.op("attn.merge", dims=dims)
    rows, keys, cut = 20, 90, 37
    q, k, v = (env.normal(n, heads, spec.head_dim) for n, heads in ((rows, 8), (keys, 2), (keys, 2)))

    def over(a: int, b: int) -> tuple[Tensor, Tensor]:
        batch = RaggedBatch.of([rows], [b - a], env.device)
        return ragged(q, k[a:b], v[a:b], batch, spec, lse=True)  # type: ignore[no-any-return]

    o, lse = merge(*over(0, cut), *over(cut, keys))
    whole, whole_lse = over(0, keys)
    return {"merged": o, "merged lse": lse, "whole": whole, "whole lse": whole_lse}


LAYERS: tuple[type[FullLayer] | type[LatentLayer], ...] = (FullLayer, LatentLayer, RopedLayer)
RELATIONS: dict[str, tuple[Callable[[Layer], Outputs], Profile]] = {
    "pages permuted": (lambda layer: permuted_pages(layer, MIXED), "core"),
    "pages permuted, decode": (lambda layer: permuted_pages(layer, DECODE), "core"),
    "pages shared": (shared_pages, "core"),
    TOGETHER: (lambda layer: alone_and_together(layer, MIXED), "core"),
    f"{PADDED}, decode": (lambda layer: padded_or_not(layer, DECODE), "buckets"),
    f"{PADDED}, mixed": (lambda layer: padded_or_not(layer, MIXED), "buckets"),
}
for make in LAYERS:
    for name, (relation, profile) in RELATIONS.items():
        add(
            Case(
                op=make.op,
                name=name,
                profile=profile,
                covers=make.covers,
                run=lambda env, m=make, f=relation: f(m(env)),
            )
        )
windowed = spec_of(window=50)
for name, relation in {TOGETHER: alone_and_together, PADDED: padded_or_not}.items():
    add(
        Case(
            op="attn.paged",
            name=f"{name}, window",
            profile="window" if relation is alone_and_together else "buckets",
            covers=FullLayer.covers,
            run=lambda env, f=relation: f(FullLayer(env, windowed), MIXED),
        )
    )
add(Case(op="attn.merge", name="split and merged", run=split_and_merged, covers=("attn.ragged",)))
