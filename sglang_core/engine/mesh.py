"""Ranks that one process drives: what must be alike on all of them, and their models, loaded one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from sglang_core.backend.communicator import LocalCommunicator
from sglang_core.backend.selection import OpTable
from sglang_core.engine.resolve import Resolved
from sglang_core.errors import ConfigError
from sglang_core.layers.build import BuildContext, WeightSpec, bind_model, named_layers
from sglang_core.layers.causal_lm import CausalLM

MakeContext = Callable[[Resolved, OpTable, torch.device, LocalCommunicator], BuildContext]


class RankOf(LocalCommunicator):
    """One rank of several of which the others are not there: layers take their share of it, and call no collective."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def check_mesh(resolved: Resolved, table: OpTable, make_context: MakeContext) -> None:
    """Raises ConfigError for what ranks that one process drives cannot do: their steps are one program, the first rank's."""
    num_ranks = resolved.config.parallel.tp_size

    def uneven(size: int) -> tuple[WeightSpec, WeightSpec] | None:
        """A weight of which the first rank of so many and the last hold unequal parts: no others differ more."""
        models = [resolved.model_class(resolved.model) for _ in range(2)]
        for model, rank in zip(models, (0, size - 1)):
            bind_model(model, make_context(resolved, table, torch.device("meta"), RankOf(rank, size)))
        return next(unequal_parts(*models), None)

    def is_even(size: int) -> bool:
        try:
            return uneven(size) is None
        except ConfigError:  # heads that do not divide
            return False

    if (found := uneven(num_ranks)) is None:
        return
    parts = " and ".join(str(list(spec.part_shape)) for spec in found)
    sizes = ", ".join(str(size) for size in range(1, num_ranks) if is_even(size))
    raise ConfigError(
        f"tp_size={num_ranks} cuts {found[0].name}, {list(found[0].shape)}, into parts of unequal size ({parts}), and"
        f" {resolved.device.backend.name!r}, where one process drives all ranks, takes equal ones; --tp-size may be {sizes}"
    )


def unequal_parts(first: CausalLM, last: CausalLM) -> Iterator[tuple[WeightSpec, WeightSpec]]:
    """Weights of which two ranks, whose models are bound, hold unequal parts, and do not fill them up."""
    for (name, ours), (_, theirs) in zip(named_layers(first), named_layers(last), strict=True):
        if ours.fills_up:
            continue
        pairs = zip(ours.weights(name), theirs.weights(name), strict=True)
        yield from ((a, b) for a, b in pairs if a.part_shape != b.part_shape)


def loaded_ranks(
    first: CausalLM, contexts: Sequence[BuildContext], load: Callable[[CausalLM, BuildContext], CausalLM]
) -> Iterator[CausalLM]:
    """Each rank's model, made and loaded when it is asked for; `first`, which is bound already, is that of the first context."""
    yield load(first, contexts[0])
    for ctx in contexts[1:]:
        yield load(type(first)(first.cfg), ctx)
