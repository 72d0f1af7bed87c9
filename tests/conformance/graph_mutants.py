"""Capturing runtimes with one mistake each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sglang_core.backend.interface import Bucket
from sglang_core.backend.tensor_tree import map_tensors
from tests.conformance.capturing import CapturedStep, CapturingRuntime


class BakesAnInput(CapturedStep):
    """It takes inputs whose path ends so for constants: the first call's stay."""

    baked = ""

    def copy_input(self, path: str, held: Tensor, given: Tensor) -> None:
        if not path.endswith(self.baked):
            held.copy_(given)


class BakesPositions(BakesAnInput):
    baked = "positions"


class BakesPages(BakesAnInput):
    """Of the page tables, through which the reference body reads; `slot_mapping` is right."""

    baked = "page_table"


class BakesLengths(BakesAnInput):
    baked = "last_key"


class BakesIds(BakesAnInput):
    baked = "token_ids"


class BakesTemperature(BakesAnInput):
    baked = "temperature"


class BakesSeeds(BakesAnInput):
    baked = "seeds"


class BakesTopK(BakesAnInput):
    baked = "top_k"


class PadsWithTheLastSlots(CapturedStep):
    """It copies slots of real tokens only: padding writes where this row wrote before, in a page that is alive."""

    def copy_input(self, path: str, held: Tensor, given: Tensor) -> None:
        if path.endswith("slot_mapping"):
            held[given != 0] = given[given != 0]
        else:
            held.copy_(given)


class SharesResults(CapturedStep):
    """Buckets hand out the same memory: one's results lie where the next one puts its own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shared: dict[int, Tensor] = {}

    def hand_out(self, out: Any) -> Any:
        if not isinstance(out, tuple):
            return super().hand_out(out)
        return tuple(self._in_shared_memory(t) for t in out)

    def _in_shared_memory(self, t: Tensor) -> Tensor:
        buffer = self.shared.setdefault(t.shape[-1], t.new_empty(64 * t.shape[-1]))
        return buffer[: t.numel()].view(t.shape).copy_(t)


class HandsOutItsMemory(CapturedStep):
    def hand_out(self, out: Any) -> Any:
        return out


class KeepsTheState(CapturedStep):
    """It donates copies of the state and never gives them back."""

    def state_to_record(self) -> Any:
        copy = replace(self.state)
        if hasattr(copy, "pool"):
            pool = object.__new__(type(copy.pool))
            pool.__dict__ |= copy.pool.__dict__ | {"leaves": [leaf.clone() for leaf in copy.pool.leaves]}
            copy.pool = pool
        copy.next_token_ids = copy.next_token_ids.clone()
        return copy


class ForgetsTheIds(CapturedStep):
    """The pool is updated in place, and the token ids are donated."""

    def state_to_record(self) -> Any:
        return replace(self.state, next_token_ids=self.state.next_token_ids.clone())


class AllocatesInReplays(CapturedStep):
    def hand_out(self, out: Any) -> Any:
        self.runtime.count += 1
        return map_tensors(out, lambda _, t: t.clone(), "")


STEPS = {
    "bakes_positions": BakesPositions,
    "bakes_pages": BakesPages,
    "bakes_lengths": BakesLengths,
    "bakes_ids": BakesIds,
    "bakes_temperature": BakesTemperature,
    "bakes_seeds": BakesSeeds,
    "bakes_top_k": BakesTopK,
    "pads_with_the_last_slots": PadsWithTheLastSlots,
    "shares_results_between_buckets": SharesResults,
    "hands_out_its_memory": HandsOutItsMemory,
    "keeps_the_state": KeepsTheState,
    "forgets_the_token_ids": ForgetsTheIds,
    "allocates_in_replays": AllocatesInReplays,
}


def runtime_of(step: type[CapturedStep]) -> type[CapturingRuntime]:
    class Mutant(CapturingRuntime):
        def compile_step(self, fn: Callable[..., Any], state: Any, buckets: Sequence[Bucket]) -> Callable[..., Any]:
            return step(self, fn, state)

    return Mutant
