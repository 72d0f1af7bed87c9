"""`Load`: one op at one shape of serving, with the bytes and the operations that no kernel of it can do without."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from sglang_conformance.env import DeviceEnv, Op
from sglang_core.backend.kernel import OpSite
from sglang_core.backend.selection import BoundOp
from sglang_core.ops.gemm import dense
from sglang_core.ops.weight import PackedWeight

# Calls go round memory of this size together, more than caches hold: in a model, other layers come in between.
RING_BYTES = 256 << 20
MOST_COPIES = 512
STEPS = {"decode 1": 1, "decode 8": 8, "decode 32": 32, "prefill 512": 512}  # tokens of a step
CONTEXT = 1024  # tokens that a decoding req attends to
PERIOD = 65_521  # a prime: rows of no width are alike
STOCKED = 2  # weights kept for the next load

# What has no natural count, and why.
UNCOUNTED = {
    "attn.plan": "on the host",
    "attn.mla_plan": "on the host",
    "ssm.plan": "on the host",
    "quant.quantize": "while weights load",
    "quant.dequantize": "while weights load",
    "logits.adjust": "a few entries of a row",
    "lora.embed": "rows of tables, as lora.apply's second product",
    "lora.experts": "moe.fused, and lora.apply an expert: what is read depends on who has which",
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """`calls` do the same on memory of their own each. `nbytes`: each operand and each result once. `flops`: a multiply-add is two."""

    calls: Sequence[Callable[[], object]]
    nbytes: int
    flops: int = 0


class Weights(NamedTuple):
    """The same weight in memory of its own, over and over; the bytes that one has as a checkpoint stores it."""

    copies: list[PackedWeight]
    nbytes: int


Stock = dict[tuple[str, str, tuple[int, ...]], Weights]


@dataclass(frozen=True, kw_only=True)
class Load:
    """`name` says the shape; `tokens` is T, for `make`."""

    op: str
    name: str
    make: Callable[[PerfEnv], Work]
    fmt: str = "*"

    @property
    def title(self) -> str:
        fmt = "" if self.fmt in ("*", "dense") else f" {self.fmt}"
        return f"{self.op}{fmt} [{self.name}]"


LOADS: list[Load] = []
MODULES = ("dense", "attention", "rows", "experts", "recurrent")  # in the order in which they are measured


def add(op: str, name: str, make: Callable[[PerfEnv], Work], *, fmt: str = "*") -> None:
    LOADS.append(Load(op=op, name=name, make=make, fmt=fmt))


def all_loads() -> list[Load]:
    for name in MODULES:
        importlib.import_module(f"sglang_conformance.perf.{name}")
    return LOADS


class PerfEnv(DeviceEnv):
    """Hands out memory in as many copies as outgrow the caches. Packing is not checked here: the cases do that.

    `stock` keeps the last weights for the next load: making and packing them takes longer than measuring them.
    """

    stock: Stock

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """Numbers that come again after PERIOD others: drawing as many as a pool holds takes longer than measuring does."""
        count = math.prod(shape)
        few = super().normal(min(count, PERIOD), scale=scale, mean=mean)
        return few.repeat(-(-count // PERIOD))[:count].view(shape)

    def canonical(self, fmt: str, *shape: int) -> PackedWeight:
        return dense(self.normal(*shape)) if fmt == "dense" else super().canonical(fmt, *shape)

    def weights(self, site: OpSite, *shape: int) -> Weights:
        """Copies of a random weight (a stack of experts where `shape` has three dims), packed for the kernel at `site`."""
        key = (site.op, site.fmt, shape)
        if key not in self.stock:
            while len(self.stock) >= STOCKED:
                del self.stock[next(iter(self.stock))]
            w = self.canonical(site.fmt, *shape)
            nbytes = size_of(*(tensor for _, tensor in w.named_buffers()))
            copies = [self.packed(_copy(w), site, checked=False) for _ in range(copies_of(nbytes))]
            self.stock[key] = Weights(copies, nbytes)
        return self.stock[key]

    def tensors(self, *shape: int, copies: int) -> list[Tensor]:
        x = self.normal(*shape)
        return [x.clone() for _ in range(copies)]

    def _remember(self, bound: Iterable[BoundOp]) -> dict[str, Op]:
        """As a model calls them: nothing looks on."""
        self.bound |= (found := {b.site.op: b for b in bound})
        return {name: b.fn for name, b in found.items()}


def _copy(w: PackedWeight) -> PackedWeight:
    tensors = {name: tensor.clone() for name, tensor in w.named_buffers()}
    return PackedWeight(
        w.fmt, tensors, out_features=w.out_features, in_features=w.in_features, num_experts=w.num_experts
    )


def copies_of(nbytes: int) -> int:
    """How often something of this size must be there so that a call does not find it in a cache."""
    return min(MOST_COPIES, max(1, -(-RING_BYTES // max(1, nbytes))))


def size_of(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
