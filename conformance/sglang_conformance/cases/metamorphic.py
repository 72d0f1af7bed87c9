"""Relations between calls that hold whatever the numbers are. What a case asserts, the bodies keep as well."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, add
from sglang_conformance.cases.attention import (
    DECODE,
    LAYER,
    MIXED,
    Reqs,
    Step,
    make_step,
    new_kv,
    spec_of,
)
from sglang_conformance.env import Env, Op
from sglang_conformance.tolerance import check_draws
from sglang_core.ops.attention import AttnSpec
from sglang_core.ops.sampling import SampleParams

COVERS = ("attn.plan", "kv.write")
FLOAT32 = (torch.float32,)


def attend(env: Env, ops: dict[str, Op], spec: AttnSpec, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    plan = ops["attn.plan"](spec, step.batch, env.device)
    return ops["attn.paged"](q, k, v, step.pool, LAYER, spec, plan)  # type: ignore[no-any-return]


def permuted_pages(env: Env, reqs: Reqs) -> Outputs:
    """The same keys and values in other pages, in another order: the same bits."""
    spec, size = spec_of(), 16
    ops = env.paged_ops(spec, size)
    step = make_step(env, spec, reqs, size)
    tokens = step.batch.num_tokens
    q, (k, v) = env.normal(tokens, spec.num_heads, spec.head_dim), new_kv(env, spec, tokens)
    first = attend(env, ops, spec, step, q, k, v)
    count = step.pool.num_pages
    new_page = torch.cat([torch.zeros(1, dtype=torch.int32), env.permutation(count - 1) + 1])
    old_slots = torch.arange(count * size, dtype=torch.int32)
    new_slots = (new_page[:, None] * size + torch.arange(size, dtype=torch.int32)).flatten()
    step.pool.move(env.place(old_slots), env.place(new_slots))
    step.batch.page_table_cpu.copy_(new_page[step.batch.page_table_cpu.long()])
    step.batch.slot_mapping_cpu.copy_(new_slots[step.batch.slot_mapping_cpu.long()])
    second = attend(env, ops, spec, step, q, k, v)
    assert torch.equal(first, second), "a page's place in the pool must not change a bit"
    return {"o": second}


def split_and_merged(env: Env) -> Outputs:
    """Attention over two halves of the keys, merged by their log-sum-exp, is attention over all."""
    spec = spec_of(causal=False)
    dims = {"Hq": spec.num_heads, "Hk": spec.num_kv_heads, "D": spec.head_dim}
    ragged, merge = env.op("attn.ragged", spec=spec, dims=dims), env.op("attn.merge", dims=dims)
    rows, keys, cut = 20, 90, 37
    q, (k, v) = env.normal(rows, spec.num_heads, spec.head_dim), new_kv(env, spec, keys)

    def over(a: int, b: int) -> tuple[Tensor, Tensor]:
        cu_q, cu_k = (env.place(torch.tensor([0, n], dtype=torch.int32)) for n in (rows, b - a))
        return ragged(q, k[a:b], v[a:b], cu_q, cu_k, spec, max_q=rows, max_k=b - a, lse=True)  # type: ignore[no-any-return]

    o, lse = merge(*over(0, cut), *over(cut, keys))
    whole, whole_lse = over(0, keys)
    return {"merged": o, "merged lse": lse, "whole": whole, "whole lse": whole_lse}


def alone_and_together(env: Env, reqs: Reqs) -> Outputs:
    """Each req in a batch of its own, in the pages that it has in the batch of all: what its neighbours hold is not seen."""
    spec, size = spec_of(), 16
    ops = env.paged_ops(spec, size)
    step = make_step(env, spec, reqs, size)
    tokens = step.batch.num_tokens
    q, (k, v) = env.normal(tokens, spec.num_heads, spec.head_dim), new_kv(env, spec, tokens)
    together = attend(env, ops, spec, step, q, k, v)
    cu = step.batch.cu_extend_cpu.tolist()
    alone = []
    for r, (prefix, extend) in enumerate(reqs):
        own = make_step(env, spec, [(prefix, extend)], size)
        rows = slice(cu[r], cu[r + 1])
        if prefix:
            kept = step.pool.gather(LAYER, env.place(step.slots[r][:prefix]))
            own.pool.scatter(LAYER, env.place(own.slots[0][:prefix]), *kept)
        alone.append(attend(env, ops, spec, own, q[rows], k[rows], v[rows]))
    if env.batch_invariant("attn.paged"):
        assert torch.equal(torch.cat(alone), together), (
            "it says batch_invariant, and a req's neighbours change its bits"
        )
    return {"together": together, "alone": torch.cat(alone)}


add(Case(op="attn.paged", name="pages permuted", run=lambda env: permuted_pages(env, MIXED), covers=COVERS))
add(Case(op="attn.paged", name="pages permuted, decode", run=lambda env: permuted_pages(env, DECODE), covers=COVERS))
add(Case(op="attn.paged", name="alone and together", run=lambda env: alone_and_together(env, MIXED), covers=COVERS))
add(Case(op="attn.merge", name="split and merged", run=split_and_merged, covers=("attn.ragged",)))

DRAWS, CLASSES = 10_000, 24


def distribution(env: Env, *, temperature: float, top_p: float, top_k: int, min_p: float) -> Outputs:
    """Draws from one row of logits, each with a seed and a position of its own, against their probabilities."""
    row = env.normal(CLASSES, scale=1.5).float()
    p = torch.softmax(row.double().cpu() / temperature, -1)
    order = torch.argsort(p, descending=True, stable=True)
    ranked = p[order]
    keep = torch.arange(CLASSES) < top_k
    ranked_k = torch.where(keep, ranked, 0.0) / ranked[keep].sum()
    keep &= (ranked_k.cumsum(0) - ranked_k) < top_p
    keep &= ranked >= min_p * ranked[0]
    kept = torch.zeros(CLASSES, dtype=torch.float64).scatter(0, order, torch.where(keep, ranked, 0.0))

    def every(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((DRAWS,), value).to(dtype).to(env.device)

    params = SampleParams(
        temperature=every(temperature),
        top_p=every(top_p),
        top_k=every(top_k, torch.int32),
        min_p=every(min_p),
        seeds=env.integers(-(2**31), 2**31 - 1, DRAWS),
        positions=env.integers(0, 100_000, DRAWS),
    )
    logits = row.expand(DRAWS, CLASSES).contiguous()
    ids, _ = env.op("sample.sample", dims={"V": CLASSES})(logits, params)
    problem = check_draws(ids, kept / kept.sum())
    assert problem is None, problem
    return {"drawn": torch.ones(1)}


PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": CLASSES, "min_p": 0.0}
for name, given in {
    "plain": {},
    "hot": {"temperature": 2.5},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.15},
    "all": {"temperature": 0.8, "top_p": 0.9, "top_k": 12, "min_p": 0.02},
}.items():
    add(
        Case(
            op="sample.sample",
            name=f"distribution, {name}",
            dtypes=FLOAT32,
            exact=("drawn",),
            run=lambda env, g=PLAIN | given: distribution(env, **g),
        )
    )
