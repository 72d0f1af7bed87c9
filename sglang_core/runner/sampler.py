"""Logits to tokens: adjust, sample, remember the token on the device, gather log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.backend.selection import OpTable
from sglang_core.layers.build import dtype_name
from sglang_core.layers.forward_batch import StepState
from sglang_core.ops.sampling import SampleParams, token_logprobs, top_logprobs


@dataclass(kw_only=True, slots=True)
class AdjustmentTensors:
    """`SparseAdjustment` on the device, E entries."""

    rows: Tensor
    ids: Tensor
    repetition: Tensor
    add: Tensor


@dataclass(kw_only=True, slots=True)
class SampleInput:
    """What sampling needs beside the logits. Row r belongs to slots[r]."""

    logits: Tensor | None  # [R, V] of the head's dtype, known once the forward has run
    params: SampleParams
    slots: Tensor  # int32[R]
    adjustment: AdjustmentTensors | None
    num_top: int  # top log-probabilities to return, -1: no log-probabilities at all


@dataclass(kw_only=True, slots=True)
class SampleOutput:
    ids: Tensor  # int32[R]
    logprobs: Tensor | None  # float32[R], of ids
    top_logprobs: Tensor | None  # float32[R, k]
    top_ids: Tensor | None  # int32[R, k]


class Sampler:
    """Bound once, like the model's layers; `step` is what the runtime compiles."""

    def __init__(self, table: OpTable, vocab_size: int, dtype: torch.dtype) -> None:
        site = OpSite(op="sample.sample", layer="Sampler", dtype=dtype_name(dtype), dims={"V": vocab_size})
        self._sample = table.bind(site).fn
        self._adjust = table.bind(replace(site, op="logits.adjust")).fn

    def step(self, state: StepState, sample: SampleInput) -> SampleOutput:
        assert sample.logits is not None
        logits = sample.logits
        if (a := sample.adjustment) is not None:
            logits = self._adjust(logits, a.rows, a.ids, a.repetition, a.add)
        ids, logprobs = self._sample(logits, sample.params, logprobs=sample.num_top >= 0)
        state.next_token_ids.index_put_((sample.slots,), ids)
        if logprobs is None:
            return SampleOutput(ids=ids, logprobs=None, top_logprobs=None, top_ids=None)
        top_ids, top = top_logprobs(logprobs, sample.num_top)
        return SampleOutput(ids=ids, logprobs=token_logprobs(logprobs, ids), top_logprobs=top, top_ids=top_ids)
