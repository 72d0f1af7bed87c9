"""Calls of products as a model makes them, on random operands of its shapes: what `tune` times and compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.interface import DeviceRuntime
from sglang_core.backend.selection import BoundOp, OpTable
from sglang_core.ops import OPS
from sglang_core.ops.formats import Fmt
from sglang_core.ops.quant import quantize
from sglang_core.ops.weight import PackedWeight

PERIOD = 65_521  # a prime: rows of no width are alike, and drawing so few takes no time
TWICE = 2
EPS = 1e-6  # of norms: a model's own is not known at a site, and changes no time
Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Step:
    """What a call is a part of: a step of so many tokens. `reqs` are (prefix, extend) each, where an op looks at them."""

    tokens: int
    title: str = ""
    reqs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class OpCall:
    """One shape. `kernel` and `body` are the same calls, on two sets of activations: what a kernel left in memory on one set is
    no right result on the other."""

    title: str
    bound: BoundOp
    kernel: tuple[Call, ...]
    body: tuple[Call, ...]


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Makes random tensors on the device. `context` is how many tokens a decoding req attends to."""

    runtime: DeviceRuntime
    table: OpTable
    context: int
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        count = math.prod(shape)
        few = torch.randn(min(count, PERIOD), generator=self.generator) * scale
        return self.place(few.to(dtype)).repeat(-(-count // PERIOD))[:count].view(shape)

    def place(self, x: Tensor) -> Tensor:
        return x.to(self.runtime.torch_device)

    def weight(self, bound: BoundOp, *shape: int) -> tuple[PackedWeight, PackedWeight]:
        """A random weight of the site's format (`shape` with three dims: a stack), as the kernel wants it and canonical."""
        dtype = dtype_of(bound)
        fmt = "dense" if bound.dequantized else bound.site.fmt
        num = shape[0] if len(shape) == 3 else None
        unit = shape[-1] ** -0.5
        if fmt == "dense":
            tensors = {"weight": self.normal(*shape, dtype=dtype, scale=unit)}
        else:  # of a stack, one is quantised, and all have its codes, in memory of their own
            x_scale = self.place(torch.full((1,), 0.02)) if Fmt.parse(fmt).static else None
            one = quantize(self.normal(*shape[-2:], dtype=dtype, scale=unit), fmt, x_scale=x_scale)
            tensors = {
                name: x if num is None else x.expand(num, *x.shape).contiguous() for name, x in one.named_buffers()
            }
        facts: Mapping[str, Any] = {"out_features": shape[-2], "in_features": shape[-1], "num_experts": num}
        canonical = PackedWeight(fmt, tensors, **facts)
        if bound.pack is None:
            return canonical, canonical
        own = {name: x.clone() for name, x in tensors.items()}
        return bound.pack(PackedWeight(fmt, own, **facts)), canonical


Maker = Callable[[Operands, BoundOp, Step], OpCall]


def dtype_of(bound: BoundOp) -> torch.dtype:
    dtype = getattr(torch, bound.site.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def linear(make: Operands, bound: BoundOp, step: Step) -> OpCall:
    """x: [T, in] times [out, in]."""
    dims, dtype, tokens = bound.site.dims, dtype_of(bound), step.tokens
    packed, canonical = make.weight(bound, dims["out"], dims["in"])
    xs = [make.normal(tokens, dims["in"], dtype=dtype) for _ in range(TWICE)]
    return OpCall(
        title=f"{bound.site.layer} {dims['in']} to {dims['out']}, {tokens} tokens",
        bound=bound,
        kernel=tuple(partial(bound.fn, x, packed) for x in xs),
        body=tuple(partial(OPS["gemm.linear"].body, x, canonical) for x in xs),
    )


def linear_gated(make: Operands, bound: BoundOp, step: Step) -> OpCall:
    """x: [T, in] times [out, in], then the activation of both halves."""
    dims, dtype, kind = bound.site.dims, dtype_of(bound), bound.site.spec
    packed, canonical = make.weight(bound, dims["out"], dims["in"])
    xs = [make.normal(step.tokens, dims["in"], dtype=dtype) for _ in range(TWICE)]
    return OpCall(
        title=f"{bound.site.layer} {dims['in']} to {dims['out']} and {kind}, {step.tokens} tokens",
        bound=bound,
        kernel=tuple(partial(bound.fn, x, packed, kind) for x in xs),
        body=tuple(partial(OPS["gemm.linear_gated"].body, x, canonical, kind) for x in xs),
    )


def grouped(make: Operands, bound: BoundOp, step: Step) -> OpCall:
    """T * K rows, as many for each expert as the others, as far as they go round."""
    dims, dtype = bound.site.dims, dtype_of(bound)
    packed, canonical = make.weight(bound, dims["X"], dims["out"], dims["in"])
    rows, num = step.tokens * dims["K"], dims["X"]
    sizes = make.place(torch.tensor([rows // num + (i < rows % num) for i in range(num)], dtype=torch.int32))
    xs = [make.normal(rows, dims["in"], dtype=dtype) for _ in range(TWICE)]
    return OpCall(
        title=f"{num} experts {dims['in']} to {dims['out']}, {rows} rows",
        bound=bound,
        kernel=tuple(partial(bound.fn, x, packed, sizes) for x in xs),
        body=tuple(partial(OPS["gemm.grouped"].body, x, canonical, sizes) for x in xs),
    )


def fused(make: Operands, bound: BoundOp, step: Step) -> OpCall:
    """Every token goes to K experts, all sets of K equally likely."""
    dims, dtype, act, tokens = bound.site.dims, dtype_of(bound), bound.site.spec, step.tokens
    w13, canonical13 = make.weight(bound, dims["X"], 2 * dims["F"], dims["M"])
    w2, canonical2 = make.weight(bound, dims["X"], dims["M"], dims["F"])
    ids = torch.rand(tokens, dims["X"], generator=make.generator).topk(dims["K"]).indices.int()
    weights = torch.rand(tokens, dims["K"], generator=make.generator) + 0.1
    routed = make.place(weights / weights.sum(1, keepdim=True)), make.place(ids)
    xs = [make.normal(tokens, dims["M"], dtype=dtype) for _ in range(TWICE)]
    return OpCall(
        title=f"{dims['X']} experts {dims['M']} by {dims['F']}, top {dims['K']}, {tokens} tokens",
        bound=bound,
        kernel=tuple(partial(bound.fn, x, w13, w2, *routed, act) for x in xs),
        body=tuple(partial(OPS["moe.fused"].body, x, canonical13, canonical2, *routed, act) for x in xs),
    )


def grouped_of_fused(table: OpTable, bound: BoundOp) -> list[BoundOp]:
    """Both products of a model's experts as `gemm.grouped`, which layers do not call by themselves."""
    dims = bound.site.dims
    shapes = ((dims["M"], 2 * dims["F"]), (dims["F"], dims["M"]))
    fmt = "dense" if bound.dequantized else bound.site.fmt
    site = replace(bound.site, op="gemm.grouped", spec=None, fmt=fmt)
    ks = {"X": dims["X"], "K": dims["K"]}
    return [table.bind(replace(site, dims=ks | {"in": width, "out": out})) for width, out in shapes]
