"""How far a device's results may be from the oracle's.

The oracle is the op's body in float64, from the same rounded inputs. The body in the case's dtype errs too: it rounds once at
the end, and sums in float32. A kernel may err twice as much (it may round an intermediate, and sums in another order), plus a
floor for the cases where the body happens to be exact. Two errors are looked at, both relative to the oracle's own size: the
largest, which sees one wrong element, and the root mean square, which sees a small error everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0
# Half types: one rounding of the largest element (eps / 2), an eighth of an ulp everywhere. float32: a sum of n terms, one after
# the other, errs by sqrt(n) * 2^-24 of its size: 5e-6 at the longest sum here, 8192 terms.
FLOOR_MAX = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FLOOR_RMS = {torch.float32: 5e-6, torch.bfloat16: 2.0**-10, torch.float16: 2.0**-13}


@dataclass(frozen=True, slots=True)
class Error:
    """Relative errors of one output."""

    max: float
    rms: float


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
    for kind in ("max", "rms"):
        mine, allowed = getattr(err, kind), getattr(most, kind)
        if mine > allowed:
            return err, f"{name}: {kind} error {mine:.2e}, allowed {allowed:.2e}"
    return err, None


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
