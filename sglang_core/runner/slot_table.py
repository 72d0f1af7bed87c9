"""`SlotTable`: what the runner keeps on the host for each running req, row by slot, so that a step is built without a loop."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_core.ops.sampling import fold_seed
from sglang_core.types import FULL, PoolGroup, SlotInit, StepPlan


class SlotTable:
    """Rows `[0, max_running)` belong to slots; row `max_running` is padding's and stays at its defaults.

    `page_table[group]: int32[S, C]`; columns past a req's last page are stale and never read unmasked.
    """

    def __init__(
        self,
        max_running: int,
        max_pages_per_req: int,
        vocab_size: int,
        groups: tuple[PoolGroup, ...] = (FULL,),
        encoder_columns: int = 0,
    ):
        rows = max_running + 1
        self.vocab_size = vocab_size
        self.page_table = {group: np.zeros((rows, max_pages_per_req), np.int32) for group in groups}
        self.encoder_table = np.zeros((rows, encoder_columns), np.int32)  # pages of what an encoder made
        self.encoder_len = np.zeros(rows, np.int32)
        self.temperature = np.zeros(rows, np.float32)
        self.top_p = np.ones(rows, np.float32)
        self.top_k = np.full(rows, vocab_size, np.int32)
        self.min_p = np.zeros(rows, np.float32)
        self.seed = np.zeros(rows, np.int32)
        self.adapter = np.full(rows, -1, np.int32)  # slot of its adapter, -1 for none
        self.adjusted = np.zeros(rows, np.bool_)  # has penalties, a bias or a minimum length
        self.num_top_logprobs = np.full(rows, -1, np.int32)  # -1: no logprobs asked for
        self._columns = np.arange(max_pages_per_req)

    @property
    def padding_slot(self) -> int:
        return len(self.seed) - 1

    def apply(self, plan: StepPlan) -> None:
        """Take in the slots that changed hands and the pages that are new with this plan."""
        for init in plan.inits:
            self._admit(init)
        for group, new_pages in plan.new_pages.items():
            table = self.page_table[group]
            for slot, start, pages in zip(plan.slots, plan.page_starts[group], new_pages):
                if pages:
                    table[slot, start : start + len(pages)] = pages

    def _admit(self, init: SlotInit) -> None:
        slot, sampling = init.slot, init.sampling
        self.encoder_table[slot, : len(init.encoder_pages)] = init.encoder_pages
        self.encoder_len[slot] = init.encoder_len
        self.temperature[slot] = 0.0 if sampling.is_greedy else sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.top_k[slot] = self.vocab_size if sampling.top_k <= 0 else min(sampling.top_k, self.vocab_size)
        self.min_p[slot] = sampling.min_p
        self.seed[slot] = fold_seed(init.seed)
        self.adapter[slot] = init.adapter
        self.adjusted[slot] = sampling.has_adjustments
        self.num_top_logprobs[slot] = (
            -1 if init.logprob is None else min(init.logprob.top_logprobs_num, self.vocab_size)
        )


Int32 = NDArray[np.int32]
