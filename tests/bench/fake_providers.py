"""Providers of one op, each with one habit, on a device whose clock a test sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_core.api import Kernel
from sglang_core.backend import selection
from sglang_core.backend.torch_runtime import TorchRuntime
from sglang_core.ops import OPS

HERE = __name__
OP = "act.gated"
BODY = "reference"

ran: list[str] = []  # the providers, call by call
memory: dict[tuple[int, ...], Tensor] = {}
broken: list[str] = []


def base(x: Tensor, kind: str) -> Tensor:
    ran.append("base")
    if broken:
        raise RuntimeError("the context is lost")
    memory[tuple(x.shape)] = OPS[OP].body(x, kind)
    return memory[tuple(x.shape)].clone()


def other(x: Tensor, kind: str) -> Tensor:
    ran.append("other")
    result: Tensor = OPS[OP].body(x, kind)
    return result


def wrong(x: Tensor, kind: str) -> Tensor:
    ran.append("wrong")
    result: Tensor = 1.2 * OPS[OP].body(x, kind)
    return result


def idle(x: Tensor, kind: str) -> Tensor:
    """Writes nothing: memory holds what another one made of the activations before."""
    ran.append("idle")
    return memory[tuple(x.shape)].clone()


def raises(x: Tensor, kind: str) -> Tensor:
    ran.append("raises")
    raise MemoryError("out of shared memory\nand a long story")


def breaks(x: Tensor, kind: str) -> Tensor:
    broken.append("breaks")
    raise RuntimeError("an illegal address")


def kernel(name: str, priority: int, *, why_not: str = "", safe: bool = False, op: str = OP) -> Kernel:
    features = frozenset({"graph_safe"} if safe else ())
    supports = (lambda ctx: why_not) if why_not else None
    return Kernel(
        op, provider=name, fn=f"{HERE}:{name}", device=("*",), priority=priority, supports=supports, features=features
    )


class Clock:
    """`took[provider]`: milliseconds, or a function of the calls timed so far. `timed`: (provider, repeats, replayed), in order."""

    def __init__(self) -> None:
        self.took: dict[str, float | Callable[[int], float]] = {}
        self.timed: list[tuple[str, int, bool]] = []

    def time_calls(
        self, runtime: TorchRuntime, call: Callable[[], object], *, repeats: int, replayed: bool = False
    ) -> list[float]:
        ran[:] = [BODY]
        call()
        name = ran[-1]
        self.timed.append((name, repeats, replayed))
        took = self.took.get(name, 10.0)
        count = sum(timed == name for timed, _, _ in self.timed)
        return [(took(count) if callable(took) else took) / 1e3] * repeats


def install(monkeypatch: pytest.MonkeyPatch, *kernels: Kernel) -> Clock:
    """All kernels that there are, and the clock of the device `cpu`."""
    clock = Clock()
    for kept in (ran, memory, broken):
        kept.clear()

    def time_calls(runtime: TorchRuntime, call: Callable[[], object], **how: Any) -> list[float]:
        return clock.time_calls(runtime, call, **how)

    monkeypatch.setattr(selection, "collect_kernels", lambda *args: list(kernels))
    monkeypatch.setattr(TorchRuntime, "time_calls", time_calls)
    return clock


# A provider of attention: its kernel takes nobody else's plan.


def plan(spec: Any, batch: Any, device: torch.device, out: Any = None) -> Any:
    return "acme's", OPS["attn.plan"].body(spec, batch, device)


def paged(q: Tensor, k: Any, v: Any, pool: Any, layer: int, spec: Any, plan: Any, **more: Any) -> Any:
    whose, own = plan
    assert whose == "acme's"
    ran.append("acme")
    return OPS["attn.paged"].body(q, k, v, pool, layer, spec, own, **more)


def unwritten(q: Tensor, k: Any, v: Any, pool: Any, layer: int, spec: Any, plan: Any, **more: Any) -> Any:
    """Attends to what is in the pool, and forgets to write."""
    return paged(q, None, None, pool, layer, spec, plan, **more)


def linear_gated(x: Tensor, w: Any, kind: str, bias: Any = None) -> Any:
    ran.append("acme")
    return OPS["gemm.linear_gated"].body(x, w, kind, bias)


def linear(x: Tensor, w: Any, bias: Any = None) -> Any:
    return OPS["gemm.linear"].body(x, w, bias)


def acme(op: str, fn: str, provider: str = "acme") -> Kernel:
    return Kernel(op, provider=provider, fn=f"{HERE}:{fn}", device=("*",))
