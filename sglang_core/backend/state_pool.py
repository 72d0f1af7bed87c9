"""`StatePool`: one rank's store of recurrent states. The runtime owns the bytes; the core owns the slot ids.

A slot holds one state, of every layer, after some token of some req. Slot 0 is scratch: padding writes there. Slots that nobody
wrote may hold NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_core.types import GroupSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class StatePoolSpec:
    """What one pool of states holds, for this rank: per layer the last inputs of a convolution, and a matrix per head."""

    group: str = "state"
    num_layers: int
    conv_shape: tuple[int, int]  # W - 1 inputs, the oldest first, of C channels
    conv_dtype: torch.dtype
    state_shape: tuple[int, int, int]  # Hv, Dk, Dv
    state_dtype: torch.dtype = torch.float32
    layout: str = "canonical"  # as kernel selection chose it; a runtime that cannot make it raises

    @property
    def group_spec(self) -> GroupSpec:
        """What scheduler and prefix tree must know of it."""
        return GroupSpec(name=self.group, kind="state")

    @property
    def bytes_per_page(self) -> int:
        """A slot is what a page is to other pools: what the core grants and takes back."""
        return self.bytes_per_slot

    @property
    def bytes_per_slot(self) -> int:
        conv, state = torch.Size(self.conv_shape).numel(), torch.Size(self.state_shape).numel()
        return self.num_layers * (conv * self.conv_dtype.itemsize + state * self.state_dtype.itemsize)


class StatePool:
    """Canonical layout: per layer one leaf conv: [N, W - 1, C] and one leaf state: [N, Hv, Dk, Dv].

    The runtime may rebind `leaves` (a functional compiler donates them); nobody holds one across a step. Writes go to the
    leaf itself, never through a view.
    """

    layout = "canonical"

    def __init__(self, spec: StatePoolSpec, num_slots: int, device: torch.device) -> None:
        self.spec, self.num_slots = spec, num_slots
        self.leaves: list[Tensor] = []
        for _ in range(spec.num_layers):
            self.leaves.append(torch.empty(num_slots, *spec.conv_shape, dtype=spec.conv_dtype, device=device))
            self.leaves.append(torch.empty(num_slots, *spec.state_shape, dtype=spec.state_dtype, device=device))

    def conv(self, layer: int) -> Tensor:
        return self.leaves[2 * layer]

    def state(self, layer: int) -> Tensor:
        return self.leaves[2 * layer + 1]

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """slots: int32[n] -> conv: [n, W - 1, C], state: [n, Hv, Dk, Dv], copies in the canonical layout."""
        return self.conv(layer)[slots], self.state(layer)[slots]

    def scatter(self, layer: int, slots: Tensor, conv: Tensor, state: Tensor) -> None:
        """The inverse of `gather`. Later rows win where slots repeat (only scratch may)."""
        self.conv(layer).index_put_((slots,), conv.to(self.spec.conv_dtype))
        self.state(layer).index_put_((slots,), state.to(self.spec.state_dtype))

    def move(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Copy slots within the pool in every layer; all reads happen before any write."""
        for layer in range(self.spec.num_layers):
            self.scatter(layer, dst_slots, *self.gather(layer, src_slots))

    def poison(self, slots: Iterable[int]) -> None:
        """Fill slots with NaN: whatever reads a state that nobody wrote then shows. A testing aid."""
        index = torch.tensor(list(slots), dtype=torch.int64, device=self.leaves[0].device)
        for leaf in self.leaves:
            leaf.index_fill_(0, index, float("nan"))

    def regions(self) -> list[tuple[int, int]]:
        """(address, bytes) of each leaf, for transports; pools of equal `fingerprint` may exchange them raw."""
        return [(leaf.data_ptr(), leaf.numel() * leaf.element_size()) for leaf in self.leaves]

    @property
    def fingerprint(self) -> str:
        s = self.spec
        return (
            f"{self.layout}/state/{s.group}/L{s.num_layers}/{s.conv_shape}{s.conv_dtype}/{s.state_shape}{s.state_dtype}"
        )
