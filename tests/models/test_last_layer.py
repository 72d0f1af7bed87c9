"""In the last layer only the rows that are read go on past attention: no result changes, and the next step finds its keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sglang_core.layers.forward_batch import ForwardBatch
from tests.models.harness import Row, Stepper, load
from tests.models.tiny import reference

FAMILIES = [
    "llama3",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3-moe",
    "gpt-oss",
    "deepseek-v2-lite",
    "deepseek-v3",
    "qwen3-next",
]


def last_rows(stepper: Stepper, work: list[tuple[Row, list[int]]], *, only_sampled: bool) -> tuple[Tensor, int]:
    """Logits of each req's last token, and how many rows came out of the last layer."""
    fb: ForwardBatch = stepper.batch(work)
    ends = torch.tensor([len(tokens) for _, tokens in work]).cumsum(0)
    fb.sample_rows, fb.only_sampled = (ends - 1).int(), only_sampled
    with torch.inference_mode():
        hidden = stepper.model(fb)
        logits = stepper.model.head(hidden if fb.narrowed else hidden[fb.sample_rows])
    return logits, len(hidden)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_result_changes(name: str, checkpoints: Path) -> None:
    model = load(reference(name, checkpoints).folder)
    results = []
    for only_sampled in (False, True):
        stepper, rows = Stepper(model), [Row(), Row()]
        found, counts = [], []
        for lengths in ([9, 5], [1, 12], [1, 1]):
            work = [(row, list(range(3, 3 + n))) for row, n in zip(rows, lengths, strict=True)]
            logits, count = last_rows(stepper, work, only_sampled=only_sampled)
            found.append(logits)
            counts.append(count)
        assert counts == ([2, 2, 2] if only_sampled else [14, 13, 2])
        results.append(torch.cat(found))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
