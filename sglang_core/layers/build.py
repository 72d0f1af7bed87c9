"""What a layer is built with, and the base class of layers: they bind their ops once and say which weights they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sglang_core.backend.communicator import Communicator, LocalCommunicator
from sglang_core.backend.pool import PoolSpec
from sglang_core.backend.selection import BoundOp, OpTable
from sglang_core.backend.state_pool import StatePoolSpec
from sglang_core.layers.lora import LoraSpec
from sglang_core.layers.module import Module
from sglang_core.layers.packing import Packing
from sglang_core.layers.quant_config import QuantConfig
from sglang_core.ops.rope import RopeSpec
from sglang_core.types import PoolGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildContext:
    """The facts a model is built with, on this rank. `page_size` and `context_length` are settled before."""

    table: OpTable
    dtype: torch.dtype
    device: torch.device
    context_length: int
    page_size: int
    kv_dtype: str = "auto"  # of the KV pools; auto: that of the activations
    tp: Communicator = field(default_factory=LocalCommunicator)
    ep_size: int = 1  # groups of the tensor-parallel ranks that experts are dealt to
    rope_tables: dict[RopeSpec, Tensor] = field(default_factory=dict, repr=False)  # shared by the layers of one model
    lora: LoraSpec | None = None  # room for adapters; None: none can be loaded


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSpec:
    """A checkpoint tensor that a layer wants: its name, its whole shape, and the part of it that this rank holds.

    The part is `ranges` (half-open) along `dim`, put one after the other; None means all of it. `init` is what random
    weights look like: "normal" has a standard deviation of `scale`, "ones" and "zeros" are constants.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # that the layer holds it in
    dim: int = 0
    ranges: tuple[tuple[int, int], ...] | None = None
    init: Literal["normal", "ones", "zeros"] = "normal"
    scale: float = 1.0
    default: float | None = None  # each number of a tensor that the checkpoint may leave out
    held: int | None = None  # bytes that the layer makes of it, where they are not the part's own

    @classmethod
    def of(
        cls,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        dim: int = 0,
        ranges: tuple[tuple[int, int], ...],
        scale: float,
        held: int | None = None,
    ) -> WeightSpec:
        """The ranges of a matrix or bias along `dim`; all of it where they cover it."""
        part = None if ranges == ((0, shape[dim]),) else ranges
        return cls(name=name, shape=shape, dtype=dtype, dim=dim, ranges=part, scale=scale, held=held)

    @property
    def part_shape(self) -> tuple[int, ...]:
        if self.ranges is None:
            return self.shape
        size = sum(stop - start for start, stop in self.ranges)
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    @property
    def nbytes(self) -> int:
        """Bytes of the part as it is read."""
        return torch.Size(self.part_shape).numel() * self.dtype.itemsize


class Layer(Module):
    """A module with ops or weights of its own. Its constructor knows shapes only and makes no tensor.

    `bind` picks its ops, once; `weights` then says what it wants from the checkpoint, and `load` takes exactly that. Before
    `bind` it is told its `name` in the model, and how the checkpoint is quantised, if it is.
    """

    name = ""
    quant: QuantConfig | None = None
    fills_up = False  # whether ranks hold parts of one size, the last ones filled up, where its weights do not divide
    copies = False  # whether `place` copies every part, so that it may be a view of a mapped file
    packing: Packing | None = None  # of a layer whose weights are quantised; known once bound
    packs: BoundOp | None = None  # known once bound: the op whose kernel packs all of its weights

    def bind(self, ctx: BuildContext) -> None:
        """Pick ops and settle what this rank holds."""

    def settle(self, ctx: BuildContext) -> None:
        """Choose what depends on how other layers were bound. Called once, when all of the model's are."""

    def weights(self, prefix: str) -> list[WeightSpec]:
        """What it wants from the checkpoint; `prefix` is its own name in the model, without a final dot."""
        return []

    def held_elsewhere(self, prefix: str) -> Iterator[str]:
        """Names of the checkpoint's tensors that are other ranks' alone."""
        return iter(())

    def place(self, index: int, part: Tensor) -> Tensor:
        """Where part `index` waits for `load`: as it came, or copied to where it belongs, so that nothing is held twice."""
        return part

    def load(self, parts: list[Tensor]) -> None:
        """Take the parts that `weights` asked for, in its order, on the device and in the dtype asked for."""


class PoolLayer(Layer):
    """A layer that keeps something of each req in a pool: that of its `group`, of which it is layer `pool_layer`.

    A step has one plan for all layers of equal `spec`, made by `plan(spec, batch, device)`; both are known once bound.
    """

    group: PoolGroup
    pool_layer = 0  # counted within the group by `bind_model`
    spec: Any
    plan: Callable[..., Any]

    def pool_spec(self, num_layers: int, page_size: int, dtype: torch.dtype) -> PoolSpec | StatePoolSpec:
        """The pool of this layer and the others of its group."""
        raise NotImplementedError

    def prepare_pool(self, pool: Any) -> None:
        """Give the pool what it must know of this layer's weights. Called once, when both are there."""


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def sibling(prefix: str, name: str) -> str:
    """The name beside `prefix`: where the checkpoint keeps the parts of what a layer fuses."""
    parent, _, _ = prefix.rpartition(".")
    return f"{parent}.{name}" if parent else name


def bind_model(model: nn.Module, ctx: BuildContext) -> None:
    """Bind every layer of a model; once for a context. Raises ConfigError where shapes do not divide over the ranks."""
    if getattr(model, "_bound_with", None) is ctx:
        return
    quant = getattr(getattr(model, "cfg", None), "quantization", None)
    in_group: Counter[PoolGroup] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, PoolLayer):
            module.pool_layer = in_group[module.group]
            in_group[module.group] += 1
        if isinstance(module, Layer):
            module.name, module.quant = name, quant
            module.bind(ctx)
    for _, layer in named_layers(model):
        layer.settle(ctx)
    ctx.table.check_formats_asked()
    model._bound_with = ctx  # type: ignore[assignment]


def named_layers(model: nn.Module) -> list[tuple[str, Layer]]:
    """Every layer of the model by its dotted name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Layer)]


def packings(model: nn.Module) -> list[Packing]:
    """Of every layer whose weights are quantised; the model must be bound."""
    return [layer.packing for _, layer in named_layers(model) if layer.packing is not None]
