"""Room for adapters in the layers of a model: a stack of low-rank pairs beside each weight, one pair a slot.

A layer holds `lora: ... | None`, which is None where no adapter may target it, and calls it with its result and its input. Which
token has the adapter of which slot is the model's `AdapterRows`, set once a step: a model file knows nothing of all this.
Stacks are zero where a slot is empty, and always finite. They are rewritten between steps, in place, and never by a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from sglang_core.backend.kernel import OpSite
from sglang_core.backend.selection import OpTable
from sglang_core.ops.lora import ExpertAdapters

ALL = "all"  # as a target: every linear layer and the experts, but neither embedding nor head
EMBEDDINGS = ("embed_tokens", "lm_head")  # targets that `all` does not mean
Ranges = tuple[tuple[int, int], ...]


@dataclass(slots=True)
class AdapterRows:
    """The step's int32[T], each token's slot or -1; None where no token has one."""

    tokens: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """What room a model keeps for adapters. `targets` are last parts of module names, as in PEFT, or "all"."""

    num_slots: int
    max_rank: int
    targets: frozenset[str]
    rows: AdapterRows = field(default_factory=AdapterRows, compare=False, repr=False)

    def covers(self, module: str) -> bool:
        """Whether adapters may target the module of this name."""
        last = module.rpartition(".")[2]
        return last in self.targets or (ALL in self.targets and last not in EMBEDDINGS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A matrix of the checkpoint that adapters may target: out x in, by its name there; what this rank holds of it.

    `columns` are the input features held (or, of an embedding, the ids), `rows` the output features.
    """

    name: str
    in_features: int
    out_features: int
    columns: tuple[int, int]
    rows: Ranges
    is_embedding: bool = False

    @property
    def num_rows(self) -> int:
        return sum(stop - start for start, stop in self.rows)


@dataclass(frozen=True, slots=True)
class Pair:
    """A rank's part of one pair, in host memory: a: [r, in], b: [out, r]; of an embedding, a: [ids, r]."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


class AdapterSlots(nn.Module):
    """The stacks of one layer. Its targets are known when it is made, its tensors once `allocate` was called."""

    targets: list[Target]

    def __init__(self, spec: LoraSpec, targets: list[Target], dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.targets, self.dtype = spec, targets, dtype

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The stacks beside `scale`, by buffer name."""
        raise NotImplementedError

    def put(self, held: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> None:
        """Fill an empty slot, in host memory and by buffer name, with the pairs of this layer's targets; those without one add nothing."""
        raise NotImplementedError

    def site(self, op: str, dims: Mapping[str, int]) -> OpSite:
        dtype = str(self.dtype).removeprefix("torch.")
        return OpSite(op=op, layer=type(self).__name__, dtype=dtype, dims=dict(dims))

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return (self.spec.num_slots, len(self.targets))

    @property
    def nbytes(self) -> int:
        """Of the stacks, from shapes."""
        return sum(torch.Size(shape).numel() * self.dtype.itemsize for shape in self.shapes().values())

    def allocate(self, device: torch.device) -> None:
        for name, shape in self.shapes().items():
            self.register_buffer(name, torch.zeros(shape, dtype=self.dtype, device=device), persistent=False)
        self.register_buffer("scale", torch.zeros(self.scale_shape, device=device), persistent=False)

    def filled(self, pairs: Mapping[str, Pair]) -> Mapping[str, Tensor]:
        """A slot with these pairs, in host memory and by buffer name."""
        held = {name: torch.zeros(shape[1:], dtype=self.dtype, device="cpu") for name, shape in self.shapes().items()}
        held["scale"] = torch.zeros(self.scale_shape[1:], device="cpu")
        if not pairs.keys().isdisjoint(target.name for target in self.targets):
            self.put(held, pairs)
        return held

    def write(self, slot: int, parts: Sequence[Mapping[str, Tensor]]) -> None:
        """Replace what the slot holds, by one write to each stack itself: through a view a functional device loses it. Between steps only.

        `parts`: what each rank is to hold that this process drives. Their stacks are one, rank after rank.
        """
        rows = [slot + rank * self.spec.num_slots for rank in range(len(parts))]
        with torch.no_grad():
            for name, buffer in self.named_buffers():
                at = torch.tensor(rows, dtype=torch.int32, device="cpu").to(buffer.device)
                buffer.index_put_((at,), torch.stack([part[name] for part in parts]).to(buffer.device))


class LinearSlots(AdapterSlots):
    """Of a linear layer, whole or merged from several matrices."""

    a: Tensor  # [A, P * R, in]
    b: Tensor  # [A, out, R]
    scale: Tensor  # float32[A, P]

    def __init__(
        self, spec: LoraSpec, targets: list[Target], dtype: torch.dtype, table: OpTable, *, out: int = 0
    ) -> None:
        """`out`: rows of the layer's output, where it is padded to more than its targets have."""
        super().__init__(spec, targets, dtype)
        self.parts = tuple(target.num_rows for target in targets)
        self.out = out or sum(self.parts)
        start, stop = targets[0].columns
        dims = {"A": spec.num_slots, "P": len(targets), "R": spec.max_rank, "in": stop - start, "out": self.out}
        self.width = stop - start
        self._op = table.bind(self.site("lora.apply", dims)).fn
        self._op_parts = self.parts if len(self.parts) > 1 else ()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        num, rank = self.spec.num_slots, self.spec.max_rank
        return {"a": (num, len(self.targets) * rank, self.width), "b": (num, self.out, rank)}

    def put(self, held: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> None:
        row = 0
        for part, (target, size) in enumerate(zip(self.targets, self.parts, strict=True)):
            if (pair := pairs.get(target.name)) is not None:
                rank = pair.a.shape[0]
                held["a"][part * self.spec.max_rank :][:rank].copy_(pair.a)
                held["b"][row : row + size, :rank].copy_(pair.b)
                held["scale"][part] = pair.scale
            row += size

    def forward(self, y: Tensor, x: Tensor, token_adapter: Tensor | None = None) -> Tensor:
        """y: [T, out], x: [T, in] -> y with what each row's adapter adds. Rows are the step's tokens unless said otherwise."""
        rows = self.spec.rows.tokens if token_adapter is None else token_adapter
        if rows is None:
            return y
        added: Tensor = self._op(y, x, self.a, self.b, rows, self.scale, self._op_parts)
        return added


class EmbeddingSlots(AdapterSlots):
    """Of the token embedding: A is a table of its own, looked up by id."""

    a: Tensor  # [A, V, R]
    b: Tensor  # [A, M, R]
    scale: Tensor  # float32[A, 1]

    def __init__(self, spec: LoraSpec, target: Target, dtype: torch.dtype, table: OpTable) -> None:
        super().__init__(spec, [target], dtype)
        self.first, self.last = target.columns
        dims = {"A": spec.num_slots, "R": spec.max_rank, "V": self.last - self.first, "M": target.out_features}
        self._op = table.bind(self.site("lora.embed", dims)).fn

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        num, rank = self.spec.num_slots, self.spec.max_rank
        return {"a": (num, self.last - self.first, rank), "b": (num, self.targets[0].out_features, rank)}

    def put(self, held: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> None:
        pair = pairs[self.targets[0].name]
        rank = pair.b.shape[1]
        held["a"][:, :rank].copy_(pair.a)
        held["b"][:, :rank].copy_(pair.b)
        held["scale"][0] = pair.scale

    def forward(self, y: Tensor, ids: Tensor) -> Tensor:
        """y: [T, M], ids: int32[T] -> y with what each token's adapter adds."""
        rows = self.spec.rows.tokens
        if rows is None:
            return y
        added: Tensor = self._op(y, ids, self.a, self.b, rows, self.scale, self.first)
        return added


class ExpertSlots(AdapterSlots):
    """Of a layer of experts: `targets` are gate, up and down of expert 0, then of expert 1, and so on; this rank holds `experts` of them."""

    KINDS: ClassVar[int] = 3

    a13: Tensor
    b13: Tensor
    a2: Tensor
    b2: Tensor
    scale: Tensor

    def __init__(self, spec: LoraSpec, targets: list[Target], dtype: torch.dtype, experts: range) -> None:
        super().__init__(spec, targets, dtype)
        self.experts = experts

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        first = self.experts.start * self.KINDS
        gate, down, rank = self.targets[first], self.targets[first + 2], self.spec.max_rank
        each = (self.spec.num_slots, len(self.experts))
        hidden, width = gate.in_features, gate.num_rows
        return {
            "a13": (*each, 2 * rank, hidden),
            "b13": (*each, 2 * width, rank),
            "a2": (*each, rank, width),
            "b2": (*each, down.num_rows, rank),
        }

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return (self.spec.num_slots, len(self.experts), self.KINDS)

    def put(self, held: Mapping[str, Tensor], pairs: Mapping[str, Pair]) -> None:
        max_rank = self.spec.max_rank
        for i, target in enumerate(self.targets):
            if (pair := pairs.get(target.name)) is None:
                continue
            expert, kind = divmod(i, self.KINDS)
            if expert not in self.experts:
                continue
            at, rank, rows = expert - self.experts.start, pair.b.shape[1], target.num_rows
            if kind == 2:
                held["a2"][at, :rank].copy_(pair.a)
                held["b2"][at, :, :rank].copy_(pair.b)
            else:
                held["a13"][at, kind * max_rank :][:rank].copy_(pair.a)
                held["b13"][at, kind * rows : (kind + 1) * rows, :rank].copy_(pair.b)
            held["scale"][at, kind] = pair.scale

    @property
    def adapters(self) -> ExpertAdapters:
        """The stacks as `lora.experts` takes them."""
        return ExpertAdapters(a13=self.a13, b13=self.b13, a2=self.a2, b2=self.b2, scale=self.scale)


class ModelSlots:
    """Every slot of a model, over its layers. Made once the model is bound."""

    def __init__(self, model: nn.Module, spec: LoraSpec) -> None:
        self.spec = spec
        model.adapter_rows = spec.rows  # type: ignore[assignment]  # a CausalLM: it sets them at the start of a step
        self.layers = [module for module in model.modules() if isinstance(module, AdapterSlots)]
        self.targets = {target.name: (target, layer.dtype) for layer in self.layers for target in layer.targets}
        self.others: list[ModelSlots] = []  # of the other ranks that this process drives: what they hold of an adapter

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def allocate(self, device: torch.device) -> None:
        for layer in self.layers:
            layer.allocate(device)

    def write(self, slot: int, pairs: Mapping[str, Pair], others: Sequence[Mapping[str, Pair]] = ()) -> None:
        """Put an adapter into a slot; `others` are the pairs of `self.others`. On the stream, between steps."""
        for i, layer in enumerate(self.layers):
            theirs = zip(self.others, others, strict=True)
            layer.write(slot, [layer.filled(pairs), *(rank.layers[i].filled(held) for rank, held in theirs)])


def covered(spec: LoraSpec | None, names: Iterable[str]) -> LoraSpec | None:
    """The spec, if adapters may target any of these modules."""
    return spec if spec is not None and any(spec.covers(name) for name in names) else None
