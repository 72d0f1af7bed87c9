"""Two hundred reqs in a pool with room for two or three, some of them aborted; then nothing of them may be left."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_conformance.e2e.checkpoint import TinyModel
from sglang_conformance.e2e.engine import FEW, Engine

ROUND, ROUNDS = 50, 4
AT_ONCE = 2 * FEW  # half of them wait
SLACK = 4096  # bytes: what threads hold of the last step. 41 bytes a req are more


@dataclass(frozen=True, kw_only=True)
class Asked:
    """`leaves` is the step after its start at which its client does, if it does."""

    prompt: list[int]
    num_new: int
    leaves: int | None


def soak(engine: Engine, model: TinyModel) -> None:
    """Raises AssertionError where pages or slots do not come back, or tensors stay that were not there before.

    The same reqs come in every round and meet each other in the same steps, so that what a kernel keeps by shape it has from the first
    ones: what is there after the last and was not after the second stays for each req.
    """
    before, generator, rnd = engine.free_pages(), torch.Generator().manual_seed(1), random.Random(1)
    asked = [draw(rnd, generator, model, engine.unit) for _ in range(ROUND)]
    crowd = [Asked(prompt=a.prompt[:3], num_new=8, leaves=None) for a in asked[:FEW]]
    peak = run(engine, crowd)
    held = []
    for _ in range(ROUNDS):
        run(engine, asked)
        engine.flush()
        assert engine.free_pages() == before, f"free pages, of all: {engine.free_pages()}, and {before} at the start"
        assert all(free == usable for free, usable in before.values()), f"free pages, of all, at the start: {before}"
        held.append(live_bytes())
    assert held[-1] <= held[1] + SLACK, f"{held[-1] - held[1]} bytes of tensors stay after {ROUND * (ROUNDS - 2)} reqs"
    assert (now := run(engine, crowd)) == peak, f"{now} reqs run at once, and {peak} could before: slots are lost"


def draw(rnd: random.Random, generator: torch.Generator, model: TinyModel, unit: int) -> Asked:
    return Asked(
        prompt=model.text(generator, rnd.randint(1, 2 * unit)),
        num_new=rnd.randint(1, 6),
        leaves=rnd.choice([None, None, None, 0, 1, rnd.randint(2, 5)]),
    )


def run(engine: Engine, asked: Sequence[Asked]) -> int:
    """All of them, `AT_ONCE` at a time. Gives how many ran at once at most."""
    waiting, leaving, there, step, peak = list(reversed(asked)), dict[str, int](), set[str](), 0, 0
    while waiting or engine.has_work:
        while waiting and len(there) < AT_ONCE:
            one = waiting.pop()
            rid = engine.add(one.prompt, one.num_new)
            there.add(rid)
            if one.leaves is not None:
                leaving[rid] = step + one.leaves
        for out in engine.step():
            if out.finish_reason is not None:
                assert out.finish_reason.type == "length", f"a req ends with {out.finish_reason}"
                there.discard(out.rid)
        for rid in [rid for rid, at in leaving.items() if at <= step]:
            del leaving[rid]
            if rid in there:
                engine.abort(rid)
                there.discard(rid)
        peak = max(peak, int(engine.stats()["running"]))
        step += 1
    return peak


def live_bytes() -> int:
    """Of every tensor that Python knows of, each storage once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), Tensor) and found.layout is torch.strided:  # isinstance would ask lazy modules
            storage = found.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
