"""`--verify-kernels RATE`: on a sample of live steps, every op that runs a kernel runs its reference body too, and is compared.

The reference runs first and on the same operands, so an op that writes (the KV pool) ends with the kernel's own writes, and the
step's result is what it would have been. Only eager steps can be looked into; a compiled one never calls the ops again.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.selection import DECOMPOSED, REFERENCE, BoundOp, OpLike
from sglang_core.ops.codes import Codes, decoded
from sglang_core.ops.weight import PackedWeight

log = logging.getLogger(__name__)

# Normalised mean square error above which an op is reported: float32 sums in another order, or one rounding to 8 or 11 bits.
LIMITS: Mapping[torch.dtype, float] = {torch.float32: 1e-8, torch.float16: 1e-5, torch.bfloat16: 1e-3}
KEPT_PLANS = 64  # reference plans remembered for steps in flight
INF = float("inf")


@dataclass(slots=True)
class OpError:
    """How far one op of a layer class was from its reference body, over all calls compared."""

    calls: int = 0
    failures: int = 0
    worst_nmse: float = 0.0
    worst_abs: float = 0.0


@dataclass(slots=True)
class KernelVerifier:
    """`instrument` goes to the OpTable; the runner makes it `active` for the steps that `choose` picks."""

    rate: float
    ops: Mapping[str, OpLike]
    seed: int = 0
    active: bool = False
    num_steps: int = 0
    errors: dict[tuple[str, str, str], OpError] = field(default_factory=dict)
    _plans: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def choose(self, step: int) -> bool:
        """Whether to verify this step; the same on every rank and every run of a seed."""
        return random.Random(self.seed * 1_000_003 + step).random() < self.rate

    def instrument(self, bound: BoundOp) -> BoundOp:
        if bound.provider == REFERENCE:
            return bound
        if self.ops[bound.site.op].host:
            return replace(bound, fn=self._both_plans(bound))
        if bound.provider == DECOMPOSED:  # its parts are instrumented themselves
            return bound
        key = (bound.site.op, bound.site.layer, bound.provider)
        error = self.errors.setdefault(key, OpError())
        kernel, body = bound.fn, self.ops[bound.site.op].body

        def verified(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return kernel(*args, **kwargs)
            want = body(*(self._canonical(arg, bound) for arg in args), **kwargs)
            got = kernel(*args, **kwargs)
            self._compare(key, error, got, want)
            return got

        return replace(bound, fn=verified)

    def stats(self) -> dict[str, float]:
        """Totals, by the names under which they are exported."""
        return {
            "verified_steps": float(self.num_steps),
            "verify_failures": float(sum(error.failures for error in self.errors.values())),
            "verify_worst_nmse": max((error.worst_nmse for error in self.errors.values()), default=0.0),
        }

    def report(self) -> str:
        """One line an op and layer class, worst first: what an operator reads when the engine ends."""
        lines = [f"{self.num_steps} steps verified against the reference bodies"]
        ranked = sorted(self.errors.items(), key=lambda item: item[1].worst_nmse, reverse=True)
        width = max((len(" ".join(key)) for key, _ in ranked), default=0)
        for key, error in ranked:
            verdict = f"{error.failures} of {error.calls} calls off" if error.failures else f"{error.calls} calls right"
            lines.append(
                f"  {' '.join(key):<{width}}  {verdict}, worst NMSE {error.worst_nmse:.1e}, element {error.worst_abs:.2g}"
            )
        return "\n".join(lines)

    def _both_plans(self, bound: BoundOp) -> Callable[..., Any]:
        kernel, body = bound.fn, self.ops[bound.site.op].body

        def plan(*args: Any, **kwargs: Any) -> Any:
            made = kernel(*args, **kwargs)
            self._plans[id(made)] = (made, body(*args, **kwargs))  # `made` is kept, so its id is not reused
            while len(self._plans) > KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            return made

        return plan

    def _canonical(self, arg: Any, bound: BoundOp) -> Any:
        """An operand as the body wants it: weights unpacked, the reference's own plan."""
        if isinstance(arg, PackedWeight) and arg.layout != "canonical" and bound.unpack is not None:
            return bound.unpack(arg)
        known = self._plans.get(id(arg))
        return arg if known is None else known[1]

    def _compare(self, key: tuple[str, str, str], error: OpError, got: Any, want: Any) -> None:
        error.calls += 1
        for mine, reference in zip(tensors_of(got), tensors_of(want), strict=True):
            nmse, worst = distance(mine, reference)
            error.worst_nmse, error.worst_abs = max(error.worst_nmse, nmse), max(error.worst_abs, worst)
            if not nmse <= LIMITS.get(mine.dtype, 0.0):  # a NaN fails too
                error.failures += 1
                log.warning("%s in %s by %s is off: NMSE %.2e, worst element %.3g", *key, nmse, worst)


def distance(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Normalised mean square error and the largest difference. Infinities must stand in the same places."""
    a, b = got.double(), want.double()
    same = a == b
    difference = torch.where(same, 0.0, a - b)
    if not difference.numel():
        return 0.0, 0.0
    power = torch.where(b.isfinite(), b, 0.0).square().mean()
    nmse = difference.square().mean() / torch.where(power > 0, power, 1.0)
    return float(nmse.nan_to_num(nan=INF, posinf=INF)), float(difference.abs().max().nan_to_num(nan=INF, posinf=INF))


def tensors_of(value: Any) -> Iterable[Tensor]:
    """Of a result, whatever holds them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Codes):  # as numbers: the last bit of what is quantised turns a code
        yield decoded(value).to(value.dtype)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_of(each)
