"""The device itself: memory, streams, pools. No kernel is needed, and no backend is excused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, add
from sglang_conformance.env import Env
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.state_pool import StatePool, StatePoolSpec

FLOAT32 = (torch.float32,)
PAGES, PAGE_SIZE, LAYERS = 9, 4, 3


def memory(env: Env) -> Outputs:
    """0 <= free <= total, and there is some."""
    found = env.runtime.memory()
    return {"sane": torch.tensor([found.total > 0, 0 <= found.free <= found.total])}


def in_order(env: Env) -> Outputs:
    """A hundred tasks, each of which reads what the one before it wrote; the host waits for the last only."""
    x = env.place(torch.ones(8))
    stream = env.runtime.stream()
    try:
        for i in range(99):
            stream.submit(lambda n=i: x.mul_(0.5).add_(n))
        done = stream.submit(lambda: x * 2).result(timeout=60)
        env.runtime.synchronize()
    finally:
        stream.close()
    return {"x": done}


def raises(env: Env) -> Outputs:
    """A task's error reaches whoever waits for it, and the next task runs."""

    def fail() -> None:
        raise ZeroDivisionError("asked for")

    stream = env.runtime.stream()
    try:
        failed = stream.submit(fail)
        after = stream.submit(lambda: 7).result(timeout=60)
        try:
            failed.result(timeout=60)
            reached = False
        except ZeroDivisionError:
            reached = True
    finally:
        stream.close()
    return {"reached, next": torch.tensor([int(reached), after])}


def kv_pool(env: Env, kind: Any = "full") -> Pool:
    """A pool in which every slot of every layer holds numbers of its own, and page 0 is NaN."""
    heads, dims = (1, (24, 8)) if kind == "mla" else (2, (16, 12))
    spec = PoolSpec(
        kind=kind,
        num_layers=LAYERS,
        page_size=PAGE_SIZE,
        num_kv_heads=heads,
        head_dim=dims[0],
        v_head_dim=dims[1],
        dtype=env.dtype,
    )
    pool = env.pool(spec, PAGES)
    slots = every_slot()[PAGE_SIZE:]
    for layer in range(LAYERS):
        pool.scatter(layer, env.place(slots), *(env.normal(len(slots), heads, dim) for dim in dims))
    return pool


def every_slot() -> Tensor:
    return torch.arange(PAGES * PAGE_SIZE, dtype=torch.int32)


def contents(env: Env, pool: Pool) -> Outputs:
    """Everything that a pool holds."""
    outputs = {}
    for layer in range(LAYERS):
        outputs[f"k{layer}"], outputs[f"v{layer}"] = pool.gather(layer, env.place(every_slot()))
    return outputs


def written(env: Env, kind: str) -> Outputs:
    return contents(env, kv_pool(env, kind))


def moved(env: Env) -> Outputs:
    """Slots that are read and written in one call, as when accepted drafts are compacted."""
    pool = kv_pool(env)
    pool.move(env.place(torch.tensor([7, 9, 10, 30]).int()), env.place(torch.tensor([6, 7, 9, 31]).int()))
    return contents(env, pool)


def poisoned(env: Env) -> Outputs:
    pool = kv_pool(env)
    pool.poison([2, PAGES - 1])
    return contents(env, pool)


def exchanged(env: Env) -> Outputs:
    """Pages that leave one pool come into another at other places; the rest of that one stays."""
    source, target = kv_pool(env), kv_pool(env)
    assert source.fingerprint == target.fingerprint, "pools of one spec have one fingerprint"
    for layer in range(LAYERS):
        stored = source.export_pages(layer, env.place(torch.tensor([3, 8, 1]).int()))
        assert all(part.device.type == "cpu" for part in stored), "exported pages are in host memory"
        target.import_pages(layer, env.place(torch.tensor([1, 2, 7]).int()), *stored)
    return contents(env, target)


def regions(env: Env) -> Outputs:
    """Regions do not overlap, and have room for the whole pool; a layout may pad."""
    pool = kv_pool(env)
    found = pool.regions()
    apart = all(a + n <= b for (a, n), (b, _) in zip(sorted(found), sorted(found)[1:], strict=False))
    whole = sum(n for _, n in found) >= PAGES * pool.spec.bytes_per_page
    return {"apart, whole": torch.tensor([apart, whole])}


def states(env: Env, change: str) -> Outputs:
    spec = StatePoolSpec(num_layers=LAYERS, conv_shape=(3, 10), conv_dtype=env.dtype, state_shape=(2, 4, 6))
    pool: StatePool = env.state_pool(spec, PAGES)
    slots = env.place(torch.arange(1, PAGES, dtype=torch.int32))
    for layer in range(LAYERS):
        state = env.place(env.normal(PAGES - 1, 2, 4, 6).float().cpu())
        pool.scatter(layer, slots, env.normal(PAGES - 1, 3, 10), state)
    if change == "move":
        pool.move(env.place(torch.tensor([3, 4]).int()), env.place(torch.tensor([4, 8]).int()))
    elif change == "poison":
        pool.poison([5])
    outputs = {}
    for layer in range(LAYERS):
        outputs[f"conv{layer}"], outputs[f"state{layer}"] = pool.gather(layer, slots)
    return outputs


KV = tuple(f"{part}{layer}" for layer in range(LAYERS) for part in "kv")
STATES = tuple(f"{part}{layer}" for layer in range(LAYERS) for part in ("conv", "state"))
add(Case(op="runtime.memory", name="figures", dtypes=FLOAT32, run=memory, exact=("sane",)))
add(Case(op="runtime.stream", name="in order", dtypes=FLOAT32, run=in_order))
add(Case(op="runtime.stream", name="errors", dtypes=FLOAT32, run=raises, exact=("reached, next",)))
for kind in ("full", "mla"):
    add(Case(op="runtime.pool", name=f"written, {kind}", run=lambda env, k=kind: written(env, k), exact=KV))
add(Case(op="runtime.pool", name="moved", run=moved, exact=KV))
add(Case(op="runtime.pool", name="poisoned", run=poisoned, exact=KV))
add(Case(op="runtime.pool", name="exported, imported", run=exchanged, exact=KV))
add(Case(op="runtime.pool", name="regions", run=regions, exact=("apart, whole",)))
for change in ("", "move", "poison"):
    name = change or "written"
    add(Case(op="runtime.state_pool", name=name, run=lambda env, c=change: states(env, c), exact=STATES))
