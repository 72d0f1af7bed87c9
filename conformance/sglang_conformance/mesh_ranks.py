"""Programs of ranks that one process drives: a step over all of them, compiled once, in which collectives are the step's own.

A mesh is traced as its first rank, so that what differs between ranks must be data: each rank's numbers are a module's, joined as weights are.
What a step gives is alike on all ranks: every rank's outputs are gathered at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sglang_conformance.rank import Program, Rank, run_reference
from sglang_core.backend.interface import DeviceRuntime


class Numbers(nn.Module):
    """What a rank's program asks for, in order."""

    def __init__(self, numbers: list[Tensor]) -> None:
        super().__init__()
        for i, x in enumerate(numbers):
            self.register_buffer(f"x{i}", x)


@dataclass
class Nothing:
    """A step's state that holds none."""

    def mutable_tensors(self) -> Iterator[Tensor]:
        return iter(())


class MeshRank(Rank):
    """The rank that a mesh is traced as. Its numbers are those of every rank."""

    given: Iterator[Tensor]

    def numbers(self, *shape: int) -> Tensor:
        return next(self.given)


def run_over_mesh(
    program: Program, args: Mapping[str, Any], *, runtime: DeviceRuntime, size: int, dtype: torch.dtype, seed: int
) -> dict[int, dict[str, Tensor]]:
    """What each rank's program returns, by rank."""
    numbers: dict[int, list[Tensor]] = {rank: [] for rank in range(size)}
    run_reference(
        program, args, size=size, dtype=dtype, seed=seed, oracle=False, seen=lambda rank, x: numbers[rank].append(x)
    )
    comms = [runtime.communicator(range(size), rank, None) for rank in range(size)]
    held = runtime.join_ranks(Numbers(numbers[rank]) for rank in range(size))

    def another() -> Any:
        raise ValueError("a step over a mesh has the communicator that it was bound with, and no other")

    def step(state: Nothing, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        me = MeshRank(
            comm=comms[0], dtype=dtype, seed=seed, timeout=0.0, runtime=runtime, place=lambda x: x, another=another
        )
        me.given = iter(list(held.buffers()))
        return {name: comms[0].all_gather(x[None], dim=0) for name, x in program(me, **args).items()}

    run: Callable[..., dict[str, Tensor]] = runtime.compile_step(step, Nothing(), ())
    made = run({"none": torch.zeros(1)})
    return {rank: {name: x[rank].cpu().contiguous() for name, x in made.items()} for rank in range(size)}
