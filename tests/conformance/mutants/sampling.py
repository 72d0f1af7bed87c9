"""Logits and sampling."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sglang_core.ops.sampling import SampleParams
from tests.conformance.mutants.bodies import Mutant, body


def mask_from_the_top_bit(logits: Tensor, bitmask: Tensor) -> Tensor:
    token = torch.arange(logits.shape[1])
    allowed = (bitmask[:, token // 32] >> (31 - token % 32)) & 1
    return torch.where(allowed == 1, logits, -math.inf)


def penalty_always_divides(logits: Tensor, rows: Tensor, ids: Tensor, repetition: Tensor, add: Tensor) -> Tensor:
    return logits.index_put((rows, ids), logits[rows, ids] / repetition + add)


def top_p_off_by_one(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    """Keeps one token more than reaches top_p."""
    scaled = logits / torch.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    p = scaled.sort(-1, descending=True).values
    p = p.masked_fill(torch.arange(p.shape[1]) >= params.top_k[:, None], -math.inf).softmax(-1)
    cumulative = p.cumsum(-1)
    count = (cumulative - p < params.top_p[:, None]).sum(-1, keepdim=True)
    more = cumulative.gather(1, count.clamp(max=p.shape[1] - 1))[:, 0] - 1e-6
    return body(
        "sample.sample", logits, replace(params, top_p=torch.where(params.top_p < 1, more, 1.0)), logprobs=logprobs
    )


def _with(logits: Tensor, params: SampleParams, logprobs: bool, **other: Any) -> Any:
    return body("sample.sample", logits, replace(params, **other), logprobs=logprobs)


def top_k_off_by_one(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    return _with(logits, params, logprobs, top_k=params.top_k + 1, max_top_k=0)


def forgets_min_p(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    return _with(logits, params, logprobs, min_p=params.min_p * 0)


def takes_the_first_rows_temperature(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    return _with(logits, params, logprobs, temperature=params.temperature[:1].expand_as(params.temperature))


def draws_without_the_position(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    return _with(logits, params, logprobs, positions=params.positions * 0)


def logprobs_after_temperature(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    ids, found = body("sample.sample", logits, params, logprobs=logprobs)
    return ids, None if found is None else (logits / params.temperature[:, None]).log_softmax(-1)


def takes_the_highest_of_equals(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    ids, found = body("sample.sample", logits.flip(-1), params, logprobs=logprobs)
    greedy = logits.shape[1] - 1 - ids
    honest, _ = body("sample.sample", logits, params)
    return torch.where(params.temperature == 0, greedy, honest), found


def begins_at_zero(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    """The running maximum of greedy rows begins at zero, which no logit may reach."""
    ids, found = body("sample.sample", logits, params, logprobs=logprobs)
    none = (logits.amax(-1) < 0) & (params.temperature == 0)
    return torch.where(none, 0, ids), found


def samples_from_65536(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    """One block's worth of the vocabulary."""
    ids, found = body("sample.sample", logits[:, : 1 << 16], params, logprobs=logprobs)
    return ids, None if found is None else logits.log_softmax(-1)


def takes_off_the_least(logits: Tensor, params: SampleParams, *, logprobs: bool = False) -> Any:
    """Shifts logits by the least of them, which is minus infinity where a grammar masks."""
    shifted = logits - logits.amin(-1, keepdim=True)
    return body("sample.sample", shifted.nan_to_num(nan=0.0, posinf=0.0), params, logprobs=logprobs)


def masks_by_a_sum(logits: Tensor, bitmask: Tensor) -> Tensor:
    """Adds minus infinity: NaN where a logit is plus infinity."""
    token = torch.arange(logits.shape[1])
    allowed = (bitmask[:, token // 32] >> (token % 32)) & 1
    return logits + torch.where(allowed == 1, 0.0, -math.inf).to(logits.dtype)


MUTANTS = {
    "mask_from_the_top_bit": Mutant("logits.mask"),
    "penalty_always_divides": Mutant("logits.adjust"),
    "top_p_off_by_one": Mutant("sample.sample"),
    "top_k_off_by_one": Mutant("sample.sample"),
    "forgets_min_p": Mutant("sample.sample"),
    "takes_the_first_rows_temperature": Mutant("sample.sample"),
    "draws_without_the_position": Mutant("sample.sample"),
    "logprobs_after_temperature": Mutant("sample.sample"),
    "takes_the_highest_of_equals": Mutant("sample.sample"),
    "begins_at_zero": Mutant("sample.sample"),
    "samples_from_65536": Mutant("sample.sample", "a whole vocabulary"),
    "takes_off_the_least": Mutant("sample.sample", "masked"),
    "masks_by_a_sum": Mutant("logits.mask"),
}
