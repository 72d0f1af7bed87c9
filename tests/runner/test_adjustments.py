"""Penalties against a dense computation written from their definitions."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_core.ops.logits import adjust
from sglang_core.runner.adjustments import MASKED, Adjustments, SparseAdjustment
from sglang_core.types import SamplingParams, SlotInit

V = 12
ids = st.lists(st.integers(0, V - 1), max_size=8)


@settings(deadline=None)
@given(
    prompt=ids,
    output=ids,
    frequency=st.sampled_from([0.0, 0.5, -0.5]),
    presence=st.sampled_from([0.0, 1.0]),
    repetition=st.sampled_from([1.0, 1.3]),
    bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from([-2.0, 3.0]), max_size=3),
    min_new_tokens=st.integers(0, 6),
    resumed=st.integers(0, 8),
)
def test_sparse_entries_equal_the_dense_definition(
    prompt: list[int],
    output: list[int],
    frequency: float,
    presence: float,
    repetition: float,
    bias: dict[int, float],
    min_new_tokens: int,
    resumed: int,
) -> None:
    sampling = SamplingParams(
        frequency_penalty=frequency,
        presence_penalty=presence,
        repetition_penalty=repetition,
        logit_bias=bias,
        min_new_tokens=min_new_tokens,
    )
    known = output[:resumed]  # a retracted req comes back with what it had
    adjustments = Adjustments(V)
    adjustments.admit(
        SlotInit(
            slot=3, sampling=sampling, seed=0, num_prompt_tokens=len(prompt), history=prompt + known, stop_ids=[0, 1]
        )
    )
    for token_id in output[resumed:]:
        adjustments.record(3, token_id)
    sparse = adjustments.sparse([7, 3])
    logits = torch.linspace(-3, 3, 2 * V).view(2, V)
    got, padded = (
        adjust(logits, *(torch.from_numpy(x) for x in (s.rows, s.ids, s.repetition, s.add)))
        for s in (sparse, sparse.padded())
    )
    assert torch.equal(got, padded), "padding changes nothing"

    want = logits.clone()
    for token_id in range(V):
        x = want[1, token_id]
        if token_id in prompt + output:
            x = x / repetition if x > 0 else x * repetition
        count = output.count(token_id)
        x = x - frequency * count - presence * (count > 0) + bias.get(token_id, 0.0)
        want[1, token_id] = x
        if len(output) < min_new_tokens and token_id in (0, 1):
            want[1, token_id] = MASKED
    assert torch.equal(got[0], logits[0]), "a row without adjustments is untouched"
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


def test_padded_adjustments_come_in_few_sizes() -> None:
    """A compiled step is compiled for each of them."""
    sizes = set()
    for count in (0, 1, 255, 256, 257, 1024, 1025, 4000):
        ones = np.ones(count, np.float32)
        padded = SparseAdjustment(np.zeros(count, np.int32), np.arange(count, dtype=np.int32), 2 * ones, ones).padded()
        assert len(padded.rows) == len(padded.ids) == len(padded.repetition) == len(padded.add) >= count
        assert (padded.repetition[count:] == 1).all() and not padded.add[count:].any()
        sizes.add(len(padded.rows))
    assert sizes == {256, 1024, 4096}
