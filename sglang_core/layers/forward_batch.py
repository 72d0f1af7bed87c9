"""`ForwardBatch`: one step's tensors, and `StepState`: everything that a step may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.state_pool import StatePool, StatePoolSpec
from sglang_core.ops.attention import AttnSpec, Plan
from sglang_core.ops.mla import MLAPlan, MLASpec
from sglang_core.ops.ssm_plan import GatedDeltaSpec, StatePlan
from sglang_core.types import PoolGroup

AnySpec = AttnSpec | MLASpec | GatedDeltaSpec
AnyPlan = Plan | MLAPlan | StatePlan
AnyPool = Pool | StatePool
AnyPoolSpec = PoolSpec | StatePoolSpec


@dataclass(kw_only=True, slots=True)
class StepState:
    """What a step may change, and nothing else: the pools, and the token each slot sampled last."""

    pools: dict[PoolGroup, AnyPool]
    next_token_ids: Tensor  # int32[max_running + 1]; the last row is where padding writes

    def mutable_tensors(self) -> Iterator[Tensor]:
        for pool in self.pools.values():
            yield from pool.leaves
        yield self.next_token_ids


@dataclass(kw_only=True, slots=True)
class ForwardBatch:
    """One step on the device. T tokens packed over R reqs.

    `plans` has one entry per attention spec in the model. `sample_rows` are the rows of the hidden states that the head maps;
    `only_sampled` says that nobody reads the others. `pools` is set from the state inside the step; nobody keeps it.
    """

    token_ids: Tensor  # int32[T]; where token_slots >= 0, the id is next_token_ids[token_slots] instead
    token_slots: Tensor | None  # int32[T], None where the host knows every id
    positions: Tensor  # int32[T]
    sample_rows: Tensor | None  # int32[S], None for all
    plans: Mapping[AnySpec, AnyPlan]
    input_embeds: Tensor | None = None  # [T, M] in place of token_ids
    only_sampled: bool = False
    token_adapter: Tensor | None = None  # int32[T], the slot of each token's adapter or -1; None where no token has one
    pools: dict[PoolGroup, Any] = field(default_factory=dict)  # a layer knows which kind its group has
    _kept: Tensor | None = None  # int32[S], in the last layer

    def enter_last_layer(self) -> None:
        """From here on a row that is not read is of use to nobody once its keys and values are written."""
        self._kept = self.sample_rows if self.only_sampled else None

    @property
    def narrowed(self) -> bool:
        """Whether the hidden states are of the sampled rows alone. A model that never enters its last layer gives all."""
        return self._kept is not None

    def kept(self, x: Tensor) -> Tensor:
        """x: [T, ...] -> the rows of those tokens that go on past this layer's attention: all, but in the last layer."""
        return x if self._kept is None else x[self._kept]
