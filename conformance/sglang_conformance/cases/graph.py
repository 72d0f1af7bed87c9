"""A compiled step is called again and again with other inputs: nothing of the first ones may stick.

What a step must give is known from the op bodies, which run it eagerly. An eager runtime passes as well: it has nothing to forget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, add
from sglang_conformance.decoder import DECODE, MAX_REQS, PREFILL, Req, Stepper
from sglang_conformance.env import Env, Op
from sglang_conformance.guard import unguarded
from sglang_core.backend.interface import Bucket
from sglang_core.backend.tensor_tree import leaves
from sglang_core.ops.sampling import SampleParams

DTYPES = (torch.float32, torch.bfloat16)
ROWS, VOCAB = 8, 200
SAMPLE = Bucket(num_tokens=ROWS, num_reqs=ROWS, max_extend=1, num_pages=1)
COVERS = ("attn.plan", "attn.paged", "kv.write")


def named(step: int, made: Outputs) -> dict[str, Tensor]:
    return {f"{name} {step}": x for name, x in made.items()}


def in_turn(env: Env) -> Outputs:
    """Two buckets in turn: reqs come, decode across the end of a page, go, and their pages come back to others.

    At last in mixed steps: decoding reqs and chunks after a prefix, in a bucket that is nearly empty, and in one that is full.
    """
    stepper = Stepper(env)
    a, b, c = (Req(slot=slot) for slot in (2, 0, 3))
    outputs: dict[str, Tensor] = {}
    work = [([(a, 14), (b, 3)], PREFILL)] + [([(a, 1), (b, 1)], DECODE)] * 3
    work += [([(c, 20)], PREFILL), ([(c, 1), (a, 1), (b, 1)], DECODE)]
    for i, (reqs, bucket) in enumerate(work):
        outputs |= named(i, stepper.run(reqs, bucket))
    stepper.release(a)
    d = Req(slot=1)
    after = [([(a, 9), (b, 4)], PREFILL), ([(b, 1), (c, 1), (a, 1)], DECODE)]
    after += [([(c, 1), (a, 3)], PREFILL), ([(b, 1), (d, 20), (c, 1), (a, 2)], PREFILL), ([(a, 1), (d, 1)], DECODE)]
    for i, (reqs, bucket) in enumerate(after, len(work)):
        outputs |= named(i, stepper.run(reqs, bucket))
    return outputs


def padded(env: Env) -> Outputs:
    """A full bucket, then one with a single req: what is padding now was live a step before, and lives on in the pool."""
    stepper = Stepper(env)
    reqs = [Req(slot=slot) for slot in range(MAX_REQS)]
    stepper.run([(req, 5) for req in reqs], PREFILL)
    outputs: dict[str, Tensor] = {}
    for i, live in enumerate((reqs, reqs[2:3], reqs[::-1], reqs[:2], reqs)):
        outputs |= named(i, stepper.run([(req, 1) for req in live], DECODE))
        outputs |= named(i, stepper.contents(reqs))
    stepper.run([(reqs[0], 11)], PREFILL)
    return outputs | stepper.contents(reqs)


def rewritten(env: Env) -> Outputs:
    """The caller's tensors are the same ones in each step, with other values: a replay reads them anew."""
    stepper = Stepper(env)
    reqs = [Req(slot=slot) for slot in range(3)]
    stepper.run([(req, 6) for req in reqs], PREFILL)
    mine = stepper.batch([(req, 1) for req in reqs], DECODE)
    outputs = named(0, stepper.call(mine, [(req, 1) for req in reqs]))
    for i, live in enumerate((reqs[::-1], reqs[:2]), 1):
        work = [(req, 1) for req in live]
        for (path, old), (_, new) in zip(leaves(mine, ""), leaves(stepper.batch(work, DECODE), ""), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)
            else:
                assert old == new, f"{path} is no tensor, and depends on more than the bucket"
        outputs |= named(i, stepper.call(mine, work))
    return outputs


def updated(env: Env) -> Outputs:
    """The pool and the token ids, as whoever holds the state finds them after each step."""
    stepper = Stepper(env)
    a, b = Req(slot=1), Req(slot=3)
    outputs: dict[str, Tensor] = {}
    for i, (reqs, bucket) in enumerate(
        [([(a, 17)], PREFILL), ([(a, 1)], DECODE), ([(b, 2)], PREFILL), ([(b, 1), (a, 1)], DECODE)]
    ):
        stepper.run(reqs, bucket)
        outputs |= named(i, stepper.contents([req for req in (a, b) if req.length]))
    return outputs


def allocations(env: Env) -> Outputs:
    """Once every bucket was seen, a step allocates nothing; for a runtime that counts."""
    stepper = Stepper(env)
    a, b = Req(slot=0), Req(slot=1)
    stepper.run([(a, 4), (b, 3)], PREFILL)
    batches = [([(a, 1), (b, 1)], DECODE), ([(a, 2)], PREFILL)] * 3
    ready = [(stepper.batch(reqs, bucket), reqs) for reqs, bucket in batches]
    seen = []
    for batch, reqs in ready:
        stepper.call(batch, reqs)
        seen.append(env.runtime.num_allocations())
    assert len(set(seen[1:])) == 1, f"replays allocate: {seen} allocations after each step"
    return {"steps": torch.tensor([len(seen)], dtype=torch.int32)}


@dataclass(kw_only=True, slots=True)
class SampleState:
    next_token_ids: Tensor

    def mutable_tensors(self) -> Iterator[Tensor]:
        yield self.next_token_ids


@dataclass(kw_only=True, slots=True)
class SampleBatch:
    logits: Tensor
    params: SampleParams


def sampling_step(sample: Op) -> Callable[[SampleState, SampleBatch], Tensor]:
    def step(state: SampleState, batch: SampleBatch) -> Tensor:
        ids: Tensor = sample(batch.logits, batch.params)[0]
        state.next_token_ids.copy_(ids)
        return ids

    return step


def sampled(env: Env) -> Outputs:
    """Every parameter in turn is another, and then the first ones again."""
    state = SampleState(next_token_ids=env.place(torch.zeros(ROWS, dtype=torch.int32)))
    step = env.runtime.compile_step(
        sampling_step(unguarded(env.op("sample.sample", dims={"V": VOCAB}))), state, (SAMPLE,)
    )
    first = SampleParams(
        temperature=torch.full((ROWS,), 1.0, device=env.device),
        top_p=torch.full((ROWS,), 1.0, device=env.device),
        top_k=torch.full((ROWS,), VOCAB, dtype=torch.int32, device=env.device),
        min_p=torch.zeros(ROWS, device=env.device),
        seeds=env.integers(-(2**31), 2**31 - 1, ROWS),
        positions=env.integers(0, 1000, ROWS),
    )
    changes: list[dict[str, Tensor]] = [
        {},
        {"temperature": first.temperature * 0},
        {"temperature": first.temperature * 3},
        {"top_k": first.top_k * 0 + 2},
        {"top_p": first.top_p * 0.2},
        {"min_p": first.min_p + 0.7},
        {"seeds": first.seeds.flip(0)},
        {"positions": first.positions + 1},
        {},
    ]
    logits = env.normal(ROWS, VOCAB, scale=2.0)
    outputs = {}
    for i, change in enumerate(changes):
        x = logits if i < len(changes) - 1 else logits.flip(1).contiguous()
        outputs[f"ids {i}"] = step(SampleBatch(logits=x, params=replace(first, **change))).clone()
        outputs[f"state {i}"] = state.next_token_ids.clone()
    return outputs


NEXT_IDS = ("next ids", *(f"next ids {i}" for i in range(5)))
for name, run in {"two buckets": in_turn, "padded": padded, "inputs rewritten": rewritten}.items():
    add(Case(op="graph.replay", name=name, dtypes=DTYPES, run=run, exact=NEXT_IDS, covers=COVERS))
add(Case(op="graph.state", name="updated", dtypes=DTYPES, run=updated, exact=NEXT_IDS, covers=COVERS))
add(Case(op="graph.memory", name="allocations", dtypes=DTYPES[:1], run=allocations, exact=("steps",)))
add(
    Case(
        op="graph.sampling", name="parameters", dtypes=DTYPES[:1], run=sampled, mismatch=0.13, covers=("sample.sample",)
    )
)
