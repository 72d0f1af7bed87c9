"""How far a device's results may be from the oracle's.

The oracle is the op's body in float64, from the same rounded inputs. The body in the case's dtype errs too: it rounds once at
the end, and sums in float32. A kernel may err twice as much (it may round an intermediate, and sums in another order), plus a
floor for the cases where the body happens to be exact. Two errors are looked at, both relative to the oracle's own size: the
largest, which sees one wrong element, and the root mean square, which sees a small error everywhere. Whatever the body errs, the
normalised mean square error stays within a bound of its own: where both are bad, nothing has been shown.

Draws are compared with the probabilities they come from by Pearson's chi-square.

Whole models are judged by the rows of their log-probabilities, one a token: the root mean square of a row's error, as a share of
how far the oracle's row spreads. Where experts are chosen for each token, rounding turns some choices, and a half type's row is
then of another mixture altogether, on the bodies as on the device. There the median row speaks for all; float32 turns none.

A backend brings no tolerances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FACTOR = 2.0
# Half types: one rounding of the largest element (eps / 2), an eighth of an ulp everywhere. float32: a sum of n terms, one after
# the other, errs by sqrt(n) * 2^-24 of its size: 5e-6 at the longest sum here, 8192 terms.
FLOOR_MAX = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FLOOR_RMS = {torch.float32: 5e-6, torch.bfloat16: 2.0**-10, torch.float16: 2.0**-13}
# A whole attention over half-type inputs errs by an ulp or two in the mean (rms 2^-9, nmse 4e-6); thirty times that is no rounding.
# float32: terms that cancel cost some digits of seven; four that are right must remain.
NMSE = {torch.float32: 1e-8, torch.bfloat16: 1e-4, torch.float16: 1e-5}
# One false alarm in a million tests of an honest sampler; 10,000 draws see a fifth of a likely token's
# probability go elsewhere.
CHI_SQUARE_SIGNIFICANCE = 1e-6
# Rows of a whole model. The oracle of a half type is the body in float32, which the device's rows may differ from twice as much as
# the body's in the half type, and an ulp. float32 is its own oracle: two layers differ by 1e-6 where sums are taken in
# another order, and no row by 1e-5; sums of 8192 terms would be ten times worse.
ROW_FLOOR = {torch.float32: 1e-4, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# One text, computed in other chunks or other company. Either run may err by as much as the other: a half type's worst rows are wrong
# by some 4%. A token of the prefix that is missing or another's changes a row by half and more.
SAME_TEXT = {torch.float32: 1e-4, torch.bfloat16: 2.0**-3, torch.float16: 2.0**-6}
# Two greedy answers may part where the two tokens' log-probabilities are this many of a row's errors apart: 4 is the most that one
# in a row of some hundreds differs, and either may.
TIE = 8.0
CHI_SQUARE_EXPECTED = 10  # tokens expected less often are counted as one: the statistic is no chi-square there


@dataclass(frozen=True, slots=True)
class Error:
    """Relative errors of one output; `ratio` is the error as a share of what is allowed, the worst of all bounds."""

    max: float
    rms: float
    ratio: float = 0.0


def error(x: Tensor, oracle: Tensor) -> Error:
    """x, oracle: float64, finite, of one shape."""
    if x.numel() == 0:
        return Error(0.0, 0.0)
    diff = x - oracle
    size, rms = float(oracle.abs().max()), float(oracle.square().mean().sqrt())
    worst, mean = float(diff.abs().max()), float(diff.square().mean().sqrt())
    return Error(worst / size if size else worst, mean / rms if rms else mean)


def limit(body: Error, dtype: torch.dtype) -> Error:
    """What a device may err, where the body errs this much."""
    return Error(FACTOR * body.max + FLOOR_MAX[dtype], FACTOR * body.rms + FLOOR_RMS[dtype])


def compare_floats(name: str, x: Tensor, body: Tensor, oracle: Tensor, dtype: torch.dtype) -> tuple[Error, str | None]:
    """The device's error, and what is wrong with it if anything is."""
    if x.shape != body.shape or x.dtype != body.dtype:
        return Error(math.inf, math.inf), (
            f"{name} is {x.dtype} {list(x.shape)} and must be {body.dtype} {list(body.shape)}"
        )
    x, body = x.double(), body.double()
    finite = oracle.isfinite()
    if bool((x[finite].isnan() | x[finite].isinf()).any()):
        return Error(math.inf, math.inf), f"{name} has NaN or infinity where the oracle has none"
    if not torch.equal(x[~finite].nan_to_num(nan=7.0), oracle[~finite].nan_to_num(nan=7.0)):
        return Error(math.inf, math.inf), f"{name} is finite or of the other sign where the oracle is infinite"
    zero = torch.zeros((), dtype=torch.float64)
    err = error(torch.where(finite, x, zero), torch.where(finite, oracle, zero))
    most = limit(error(torch.where(finite, body, zero).nan_to_num(), torch.where(finite, oracle, zero)), dtype)
    bounds = {
        "max error": (err.max, most.max),
        "rms error": (err.rms, most.rms),
        "nmse": (err.rms**2, NMSE[dtype]),
    }
    kind, (mine, allowed) = max(bounds.items(), key=lambda item: item[1][0] / item[1][1])
    err = replace(err, ratio=mine / allowed)
    return err, f"{name}: {kind} {mine:.2e}, allowed {allowed:.2e}" if err.ratio > 1 else None


def check_draws(ids: Tensor, probabilities: Tensor) -> str | None:
    """What is wrong with draws from one distribution, if anything is. ids: int[N], probabilities: float64[V]."""
    seen = torch.bincount(ids.cpu().long(), minlength=probabilities.numel()).double()
    expected = probabilities.cpu().double() * ids.numel()
    if bool(((expected == 0) & (seen > 0)).any()):
        return f"token {int(((expected == 0) & (seen > 0)).nonzero()[0])} was drawn, and cannot be"
    rare = expected < CHI_SQUARE_EXPECTED
    if bool(rare.any()):
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
        seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    statistic = ((seen - expected).square() / expected.clamp(min=1e-300)).sum()
    p = float(torch.special.gammaincc(torch.tensor((expected.numel() - 1) / 2).double(), statistic / 2))
    if p >= CHI_SQUARE_SIGNIFICANCE:
        return None
    return f"the draws do not follow their probabilities: chi-square {float(statistic):.1f} of {expected.numel()} classes, p = {p:.1e}"


def compare_exact(name: str, x: Tensor, body: Tensor) -> str | None:
    """Bit for bit, NaN equal to NaN."""
    if x.shape != body.shape or x.dtype != body.dtype:
        return f"{name} is {x.dtype} {list(x.shape)} and must be {body.dtype} {list(body.shape)}"
    same = (x == body) | (x.isnan() & body.isnan()) if x.is_floating_point() else x == body
    return None if bool(same.all()) else f"{name}: {int((~same).sum())} of {same.numel()} elements differ, and none may"


def compare_integers(name: str, x: Tensor, oracle: Tensor, mismatch: float) -> str | None:
    if x.shape != oracle.shape or x.dtype != oracle.dtype:
        return f"{name} is {x.dtype} {list(x.shape)} and must be {oracle.dtype} {list(oracle.shape)}"
    share = float((x != oracle).double().mean()) if x.numel() else 0.0
    return None if share <= mismatch else f"{name}: {share:.1%} of the elements differ, allowed {mismatch:.1%}"


def row_errors(x: Tensor, oracle: Tensor) -> Tensor:
    """x, oracle: log-probabilities [T, V] -> float64[T], each row's error as a share of the spread of the oracle's."""
    x, oracle = x.double(), oracle.double()
    return (x - oracle).square().mean(-1).sqrt() / oracle.std(-1, correction=0)


def compare_rows(
    name: str, x: Tensor, body: Tensor, oracle: Tensor, dtype: torch.dtype, *, routed: bool
) -> tuple[Error, str | None]:
    """The error of a whole model's log-probabilities, and what is wrong with it. `routed`: experts are chosen for each token."""
    if x.shape != oracle.shape or not bool(x.isfinite().all()):
        return Error(math.inf, math.inf), f"{name}: {list(x.shape)} must be {list(oracle.shape)}, and finite"
    rows, body_rows = row_errors(x, oracle), row_errors(body, oracle)
    kind, mine = _judged(rows, dtype, routed)
    allowed = FACTOR * _judged(body_rows, dtype, routed)[1] + ROW_FLOOR[dtype]
    err = Error(float(rows.max()), float(rows.median()), mine / allowed)
    return err, f"{name}: {kind} errs by {mine:.2e}, allowed {allowed:.2e}" if err.ratio > 1 else None


def compare_texts(x: Tensor, other: Tensor, dtype: torch.dtype, *, routed: bool) -> str | None:
    """What is wrong with rows [T, V] of one text that was computed twice, if anything is."""
    if not bool(x.isfinite().all()):
        return "a row is not finite"
    kind, mine = _judged(row_errors(x, other), dtype, routed)
    allowed = SAME_TEXT[dtype]
    return f"{kind} differs by {mine:.2e}, allowed {allowed:.2e}" if mine > allowed else None


def may_part(row: Tensor, token: int, other: int, dtype: torch.dtype, *, routed: bool) -> bool:
    """Whether two greedy runs may take `token` and `other` after the same text, whose log-probabilities are `row`: [V]."""
    if routed and dtype != torch.float32:
        return True  # a turned choice of experts; the rows themselves are judged
    return float((row[token] - row[other]).abs()) <= TIE * SAME_TEXT[dtype] * float(row.std(correction=0))


def _judged(rows: Tensor, dtype: torch.dtype, routed: bool) -> tuple[str, float]:
    """Which of float64[T] stands for all, and its error."""
    if routed and dtype != torch.float32:
        return "the median row", float(rows.median())
    return "the worst row", float(rows.max())
