"""Penalties, logit biases and minimum lengths: what changes a req's logits because of the tokens it already has."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sglang_core.runner.slot_table import Int32
from sglang_core.types import SamplingParams, SlotInit

MASKED = -1e30  # finite, so that a row with every id masked still samples
LEAST_ENTRIES = 256  # of a padded adjustment


@dataclass(slots=True)
class _History:
    sampling: SamplingParams
    stop_ids: list[int]
    seen: set[int]  # prompt and output: what the repetition penalty looks at (CTRL, arXiv:1909.05858)
    output_counts: Counter[int] = field(default_factory=Counter)  # what frequency and presence penalties look at
    num_output: int = 0


@dataclass(frozen=True, slots=True)
class SparseAdjustment:
    """E entries, one per (row, id) that changes: `repetition` divides positive and multiplies negative logits, then `add`."""

    rows: Int32
    ids: Int32
    repetition: NDArray[np.float32]
    add: NDArray[np.float32]

    def padded(self) -> SparseAdjustment:
        """With entries that change nothing, to one of few sizes: for steps that are compiled for each."""
        missing = LEAST_ENTRIES
        while missing < len(self.rows):
            missing *= 4
        missing -= len(self.rows)
        zeros, ones = np.zeros(missing, np.int32), np.ones(missing, np.float32)
        return SparseAdjustment(
            np.concatenate([self.rows, zeros]),
            np.concatenate([self.ids, zeros]),
            np.concatenate([self.repetition, ones]),
            np.concatenate([self.add, 0 * ones]),
        )


class Adjustments:
    """The token history of the slots that need one. Owned by the stream's thread: steps call it in order."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slots: dict[int, _History] = {}

    def admit(self, init: SlotInit) -> None:
        self._slots.pop(init.slot, None)
        if not init.sampling.has_adjustments:
            return
        prompt, output = init.history[: init.num_prompt_tokens], init.history[init.num_prompt_tokens :]
        history = _History(init.sampling, init.stop_ids, set(prompt))
        self._slots[init.slot] = history
        for token_id in output:
            self._append(history, token_id)

    def record(self, slot: int, token_id: int) -> None:
        """A token was sampled for `slot`."""
        if (history := self._slots.get(slot)) is not None:
            self._append(history, token_id)

    def sparse(self, slots: list[int]) -> SparseAdjustment:
        """The adjustment of a step whose row r belongs to slots[r]."""
        rows: list[int] = []
        ids: list[int] = []
        repetition: list[float] = []
        add: list[float] = []
        for row, slot in enumerate(slots):
            if (history := self._slots.get(slot)) is None:
                continue
            for token_id, (factor, term) in self._entries(history).items():
                rows.append(row)
                ids.append(token_id)
                repetition.append(factor)
                add.append(term)
        return SparseAdjustment(
            np.asarray(rows, np.int32),
            np.asarray(ids, np.int32),
            np.asarray(repetition, np.float32),
            np.asarray(add, np.float32),
        )

    def _append(self, history: _History, token_id: int) -> None:
        history.seen.add(token_id)
        history.output_counts[token_id] += 1
        history.num_output += 1

    def _entries(self, history: _History) -> dict[int, tuple[float, float]]:
        """Token id -> (repetition factor, additive term)."""
        sampling = history.sampling
        repetition = sampling.repetition_penalty
        entries = dict.fromkeys(history.seen, (repetition, 0.0)) if repetition != 1.0 else {}
        terms: defaultdict[int, float] = defaultdict(float)
        if sampling.frequency_penalty or sampling.presence_penalty:
            for token_id, count in history.output_counts.items():
                terms[token_id] -= sampling.frequency_penalty * count + sampling.presence_penalty
        for token_id, bias in sampling.logit_bias.items():
            terms[token_id] += bias
        if history.num_output < sampling.min_new_tokens:
            for token_id in history.stop_ids:
                terms[token_id] = MASKED
        for token_id, term in terms.items():
            if 0 <= token_id < self._vocab_size:
                entries[token_id] = (entries.get(token_id, (1.0, 0.0))[0], term)
        return entries
