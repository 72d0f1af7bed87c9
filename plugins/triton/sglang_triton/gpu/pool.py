"""Pools of GPUs: slots are moved, and pages leave and come back, with one launch for all layers and one copy."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.api import Pool, PoolSpec, StatePool, StatePoolSpec
from sglang_triton.page_copy import Rows


class GpuPool(Pool):
    """The canonical layout. Its leaves stay where they are: graphs know their addresses, and so do the tables here."""

    def __init__(self, spec: PoolSpec, num_pages: int, device: torch.device) -> None:
        super().__init__(spec, num_pages, device)
        self._slots = Rows([leaf.flatten(0, 1) for leaf in self.leaves])
        self._pages = [Rows(self.layer_leaves(layer)) for layer in range(spec.num_layers)]

    def move(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Two launches: what is read is all read before anything is written."""
        self._slots.scatter(dst_slots, self._slots.gather(src_slots))

    def export_pages(self, layer: int, pages: Tensor) -> tuple[Tensor, ...]:
        rows = self._pages[layer]
        return rows.parts(rows.gather(pages).cpu())

    def import_pages(self, layer: int, pages: Tensor, *stored: Tensor) -> None:
        rows = self._pages[layer]
        rows.scatter(pages, rows.joined(stored).to(pages.device))


class GpuStatePool(StatePool):
    """The canonical layout, whose leaves stay where they are."""

    def __init__(self, spec: StatePoolSpec, num_slots: int, device: torch.device) -> None:
        super().__init__(spec, num_slots, device)
        self._slots = Rows(self.leaves)

    def move(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        self._slots.scatter(dst_slots, self._slots.gather(src_slots))
