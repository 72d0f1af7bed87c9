"""Weights in every format as the kernels read them: panels of 16 output columns (`Weight` in csrc/isa.h), packed once at load.

One copy serves every batch size and every ISA level, AMX tiles included: with few rows a kernel widens codes in registers, with many it
widens a block of panels once for all of them. Codes keep the bits that the checkpoint has; bfloat16 too, whose exponents are
coded where decoding them hides behind the products (csrc/exponents.h): 0.75 of the bytes, the same numbers. A stack of experts
has one leading dim more in every tensor, but panels of coded exponents are counted through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_core.api.ops import Fmt, PackedWeight
from sglang_xeon import huge_pages, isa, library
from sglang_xeon.library import ops

LAYOUT = "xeon.panels"
PANEL = 16
GROUP_ALIGN = 8  # k that a group is filled up to where columns are reordered: a unit of 4-bit codes
BLOCK_ROWS = 128  # of fp8.block128, that share a scale

# As csrc/isa.h numbers them.
_DENSE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PLAIN = frozenset(_DENSE.values())
_INT4, _INT4_ZERO, _E2M1, _FP8, _INT8, _CODED = 3, 4, 5, 6, 7, 8
_UNITS = {0: 2, 1: 2, 2: 2, _CODED: 8, _INT4: 8, _INT4_ZERO: 8, _E2M1: 8, _FP8: 4, _INT8: 4}
_UNIT_BYTES = {0: 128, _CODED: 192}  # others: 64
_SCALES = {torch.float32: 0, torch.uint8: 1, torch.float8_e4m3fn: 2, torch.bfloat16: 3, torch.float16: 4}
_QUANTIZE = ("as_is", "fp8", "fp8_static", "fp8_block", "int8", "int8_asym", "nvfp4", "nvfp4_static")
_TENSORS = (
    *("packed", "scales", "zeros", "column_scale", "column_sum"),
    *("tables", "starts", "escapes", "order", "bounds", "x_scale"),
)
_STACK_TENSORS = tuple(name for name in _TENSORS if name not in ("order", "bounds"))

MOST_ESCAPES = 1e-3  # of a weight's numbers: each costs as much as forty others

_pack, _unpack, _measure = ops.pack.default, ops.unpack.default, ops.measure_exponents.default
_pack_coded, _unpack_coded = ops.pack_exponents.default, ops.unpack_exponents.default


@dataclass(frozen=True, slots=True)
class Shape:
    """How a format lies in panels."""

    element: int
    n: int
    k: int
    group: int  # k that share a scale; 0: a column has one, or none
    scale_type: int
    quantize: int

    @classmethod
    def of(cls, w: PackedWeight) -> Shape:
        fmt = Fmt.parse(w.fmt)
        if fmt.is_dense:
            dtype = w["packed" if w.layout == LAYOUT else "weight"].dtype
            element = _CODED if "escapes" in w._buffers else _DENSE[dtype]
            return cls(element, w.out_features, w.in_features, 0, 0, 0)
        int4 = _INT4_ZERO if fmt.has_zero else _INT4
        element = {"fp8": _FP8, "int8": _INT8, "e2m1": _E2M1, "int4": int4}[fmt.element]
        group = w.in_features if fmt.group == -1 else fmt.group or 0
        scales = w["scales" if w.layout == LAYOUT else "scale"].dtype if group else torch.float32
        return cls(element, w.out_features, w.in_features, group, _SCALES[scales], _QUANTIZE.index(fmt.activation))

    @property
    def facts(self) -> list[int]:
        """As `Facts` of csrc/weight_args.h."""
        return [self.element, self.scale_type, self.quantize, self.n, self.k, self.group]

    @property
    def panels(self) -> int:
        return -(-self.n // PANEL)

    def num_bytes(self, order: Tensor | None) -> int:
        """Of the codes."""
        unit = _UNITS[self.element]
        units = -(-self.k // unit) if order is None else order.shape[-1] // unit
        return self.panels * units * _UNIT_BYTES.get(self.element, 64)


def operands(w: PackedWeight) -> tuple[Tensor | None, ...]:
    """The tensors of a packed weight in the order of the C++ ops, None for those that its format lacks."""
    return tuple(w._buffers.get(name) for name in _TENSORS)


def stack_operands(w: PackedWeight) -> tuple[Tensor | None, ...]:
    """As `operands`, of a stack of experts, which knows no order of columns."""
    return tuple(w._buffers.get(name) for name in _STACK_TENSORS)


def facts(w: PackedWeight) -> list[int]:
    """The numbers that the C++ ops want beside `operands`."""
    known: list[int] | None = getattr(w, "_xeon_facts", None)
    if known is None:
        known = Shape.of(w).facts
        w._xeon_facts = known  # type: ignore[assignment]
    return known


num_rewritten = 0  # weights of this process that `pack` has changed since: their tensors may be others (step_graph.py)


def pack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """Canonical -> panels. With `out`, an earlier result, its bytes are rewritten; its tensors are replaced only where exponents were
    coded and too many numbers have no code now, or where scales were kept in 16 bits and need more now.

    Raises ValueError where `out` was packed for another order of columns (act_order) that does not fit it.
    """
    global num_rewritten
    if out is None:
        return PackedWeight(
            w.fmt,
            _coded(w) or _plain(w, None),
            out_features=w.out_features,
            in_features=w.in_features,
            num_experts=w.num_experts,
            layout=LAYOUT,
        )
    num_rewritten += 1
    if "escapes" in out._buffers:
        _rewrite_coded(out, _coded(w) or _plain(w, None))
    else:
        _make_room(out, w)
        _plain(w, _tensors(out))
    return out


def unpack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """The inverse of `pack`, bit for bit."""
    if "escapes" in w._buffers:
        made = _decoded(w)
    elif w.num_experts is None:
        made = _canonical(w, _tensors(w))
    else:
        tensors = _tensors(w)
        each = [_canonical(w, {name: t[i] for name, t in tensors.items()}) for i in range(w.num_experts)]
        made = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    if out is not None:
        for name, tensor in made.items():
            out[name].copy_(tensor)
        return out
    return PackedWeight(w.fmt, made, out_features=w.out_features, in_features=w.in_features, num_experts=w.num_experts)


def _plain(w: PackedWeight, into: dict[str, Tensor] | None) -> dict[str, Tensor]:
    scales = _scale_dtype(w) if into is None else into["scales"].dtype if "scales" in into else None
    return _packed(w, scales, into) if w.num_experts is None else _packed_stack(w, scales, into)


def _scale_dtype(w: PackedWeight) -> torch.dtype | None:
    """The smallest dtype that holds all scales of its groups as they are: most checkpoints have them in 16 bits. None: it has no groups."""
    if not Shape.of(w).group:
        return None
    scale = w["scale"]
    if scale.dtype is not torch.float32:
        return scale.dtype
    fits = (dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(scale.to(dtype).float(), scale))
    return next(fits, torch.float32)


def _make_room(out: PackedWeight, w: PackedWeight) -> None:
    """Scales of 32 bits where those of `out` have 16 and the ones of `w` do not fit them."""
    if (
        "scales" not in out._buffers
        or out["scales"].dtype in (torch.float32, _scale_dtype(w))
        or w["scale"].dtype is not torch.float32
    ):
        return
    out.register_buffer("scales", out["scales"].float())
    out.__dict__.pop("_xeon_facts", None)


def _rewrite_coded(out: PackedWeight, made: dict[str, Tensor]) -> None:
    if "escapes" in made:
        for name, tensor in made.items():
            out[name].copy_(tensor)
        return
    for name in tuple(out._buffers):
        del out._buffers[name]
    for name, tensor in made.items():
        out.register_buffer(name, tensor)
    out.__dict__.pop("_xeon_facts", None)


def _coded(w: PackedWeight) -> dict[str, Tensor] | None:
    """The packed tensors with coded exponents, or None where a weight is better off as it is."""
    weight = w["weight"]
    if w.fmt != "dense" or weight.dtype is not torch.bfloat16 or not weight.numel():
        return None
    if not isa.codes_exponents(library.level()):
        return None
    stack = _rows(weight if w.num_experts is not None else weight[None])
    panels = len(stack) * -(-w.out_features // PANEL)
    tables, starts = torch.empty(panels, 16, dtype=torch.uint8), torch.empty(panels + 1, dtype=torch.int32)
    _measure(stack, tables, starts)
    room = max(int(MOST_ESCAPES * weight.numel()), 1)  # for other weights in their place, too
    if int(starts[-1]) > room:
        return None
    packed = huge_pages.empty(panels * -(-w.in_features // _UNITS[_CODED]) * _UNIT_BYTES[_CODED])
    escapes = torch.zeros(room, dtype=torch.int64)
    _pack_coded(stack, tables, starts, packed, escapes)
    if w.num_experts is not None:
        packed = packed.view(w.num_experts, -1)
    return {"packed": packed, "tables": tables, "starts": starts, "escapes": escapes}


def _decoded(w: PackedWeight) -> dict[str, Tensor]:
    weight = torch.empty(w.num_experts or 1, w.out_features, w.in_features, dtype=torch.bfloat16)
    _unpack_coded(w["packed"], w["tables"], w["starts"], w["escapes"], weight)
    return {"weight": weight if w.num_experts is not None else weight[0]}


def _rows(weight: Tensor) -> Tensor:
    return weight if weight.stride(-1) == 1 else weight.contiguous()


def _tensors(w: PackedWeight) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in w._buffers.items() if tensor is not None}


def _packed_stack(w: PackedWeight, scales: torch.dtype | None, into: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Expert by expert into stacks that the first one's sizes tell."""
    assert w.num_experts is not None
    stacks = into or {}
    for i in range(w.num_experts):
        if stacks:
            _packed(w.expert(i), scales, {name: stack[i] for name, stack in stacks.items()})
            continue
        first = _packed(w.expert(i), scales, None)
        stacks = {name: _stack(t, w.num_experts) for name, t in first.items()}
        for name, t in first.items():
            stacks[name][i] = t
    return stacks


def _stack(one: Tensor, count: int) -> Tensor:
    """Room for so many of one, undefined."""
    return huge_pages.empty(count * one.nbytes).view(one.dtype).view(count, *one.shape)


def _packed(w: PackedWeight, scales: torch.dtype | None, into: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """One matrix -> its packed tensors, by name; with scales of this dtype, which holds them."""
    shape, fmt = Shape.of(w), Fmt.parse(w.fmt)
    made: dict[str, Tensor] = {}
    if fmt.act_order:
        made["order"], made["bounds"] = _order(w["group"], w["scale"].shape[-1])
    order = made.get("order")
    if fmt.is_dense:
        pass
    elif shape.group:
        scale = w["scale"]
        if fmt.element == "fp8":  # a block of rows shares one
            scale = scale.repeat_interleave(BLOCK_ROWS, dim=0)[: shape.n]
        made["scales"] = _by_panel(scale.to(scales))
    else:
        made["column_scale"] = _by_column(w["scale"])
    if fmt.has_zero:
        made["zeros"] = _by_panel(w["zero"])
    if "global_scale" in w._buffers:
        made["column_scale"] = _by_column(w["global_scale"])
    if fmt.element == "int8":
        made["column_sum"] = _by_column(w["weight"].sum(1, dtype=torch.int32))
    if fmt.static:
        made["x_scale"] = w["x_scale"]
    if into is not None:
        _rewrite(into, made, w.fmt)
    packed = huge_pages.empty(shape.num_bytes(order)) if into is None else into["packed"]
    _pack(_rows(w["weight"]), packed, order, shape.element, shape.k)
    if into is None:
        made = {"packed": packed.view(w["weight"].dtype) if fmt.is_dense else packed} | made
    return made


def _rewrite(into: dict[str, Tensor], made: dict[str, Tensor], fmt: str) -> None:
    for name, tensor in made.items():
        if into[name].shape != tensor.shape:
            raise ValueError(
                f"a weight of {fmt} cannot be rewritten in place: its {name} is {list(tensor.shape)}, and was "
                f"{list(into[name].shape)} (another g_idx); load the model anew"
            )
        into[name].copy_(tensor)


def _canonical(w: PackedWeight, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One matrix's packed tensors -> canonical ones."""
    shape, fmt, packed = Shape.of(w), Fmt.parse(w.fmt), tensors["packed"]
    dtype = packed.dtype if fmt.is_dense else fmt.containers(shape.k)["weight"].dtype
    columns = shape.k // 2 if _UNITS[shape.element] == 8 else shape.k
    weight = torch.zeros(shape.n, columns, dtype=dtype)
    _unpack(packed, weight, tensors.get("order"), shape.element, shape.k)
    made = {"weight": weight}
    if shape.group:
        scale = _from_panel(tensors["scales"], shape.n)
        scale = scale.float() if scale.dtype in (torch.bfloat16, torch.float16) else scale
        made["scale"] = scale[::BLOCK_ROWS].contiguous() if fmt.element == "fp8" else scale
    elif not fmt.is_dense:
        made["scale"] = tensors["column_scale"][: shape.n].clone()
    if fmt.has_zero:
        made["zero"] = _from_panel(tensors["zeros"], shape.n)
    if fmt.act_order:
        made["group"] = _groups(tensors["order"], tensors["bounds"], shape.k)
    if fmt.element == "e2m1" and shape.group == 16:
        made["global_scale"] = tensors["column_scale"][: shape.n].clone()
    if fmt.static:
        made["x_scale"] = tensors["x_scale"].clone()
    return made


def _by_panel(x: Tensor) -> Tensor:
    """x: [n, G] -> [panels, G, 16], the rows that are missing as zeros."""
    n, groups = x.shape
    made = torch.zeros(-(-n // PANEL) * PANEL, groups, dtype=x.dtype)
    made[:n] = x
    return made.view(-1, PANEL, groups).transpose(1, 2).contiguous()


def _from_panel(x: Tensor, n: int) -> Tensor:
    return x.transpose(1, 2).reshape(-1, x.shape[1])[:n].contiguous()


def _by_column(x: Tensor) -> Tensor:
    """x: [n] -> [panels * 16]."""
    made = torch.zeros(-(-x.shape[0] // PANEL) * PANEL, dtype=x.dtype)
    made[: x.shape[0]] = x
    return made


def _order(group: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """group: int32[k], the group of each column -> order: int32[k_padded], -1 where nothing is; bounds: int32[G + 1]."""
    counts = torch.bincount(group.long(), minlength=num_groups)
    padded = (counts + GROUP_ALIGN - 1) // GROUP_ALIGN * GROUP_ALIGN
    ends, starts = padded.cumsum(0), padded.cumsum(0) - padded
    columns = torch.argsort(group, stable=True)
    within = torch.arange(group.shape[0]) - (counts.cumsum(0) - counts)[group[columns].long()]
    order = torch.full((int(ends[-1]),), -1, dtype=torch.int32)
    order[starts[group[columns].long()] + within] = columns.int()
    return order, torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()


def _groups(order: Tensor, bounds: Tensor, k: int) -> Tensor:
    """The inverse of `_order`."""
    owner = torch.repeat_interleave(torch.arange(bounds.shape[0] - 1, dtype=torch.int32), bounds.diff().long())
    group = torch.empty(k, dtype=torch.int32)
    group[order[order >= 0].long()] = owner[order >= 0]
    return group
