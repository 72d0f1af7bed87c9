"""`Assembly`: the canonical tensors of a weight, filled part by part in whatever order a checkpoint brings them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sglang_core.errors import WeightError
from sglang_core.layers.staging import staging
from sglang_core.layers.stored import Stored, StoredTensor
from sglang_core.ops.formats import Fmt
from sglang_core.ops.gemm import dense
from sglang_core.ops.weight import PackedWeight

FLOATS = 1 << 18  # of a weight that is quantised as it loads: how many are in float32 at a time


class Assembly:
    """A matrix [rows, columns] in `fmt`, or a stack of `num_experts` such, made of parts one below the other."""

    def __init__(
        self,
        fmt: Fmt,
        rows: int,
        columns: int,
        *,
        where: str,
        quantize: Callable[..., PackedWeight],
        num_experts: int | None = None,
    ) -> None:
        """`where` names the layer in errors; `quantize` is the op quant.quantize."""
        self._quantize = quantize
        self.fmt, self.rows, self.columns, self.num_experts, self.where = fmt, rows, columns, num_experts, where
        self._containers = fmt.containers(columns)
        self._tensors: dict[str, Tensor] = {}
        self._whole: set[tuple[str, int | None]] = set()  # tensors without rows that have come once

    def take(
        self,
        stored: Stored,
        tensor: StoredTensor,
        part: Tensor,
        rows: int,
        *,
        first_row: int = 0,
        expert: int | None = None,
    ) -> Tensor:
        """Put what was read of one of a checkpoint's tensors, `rows` rows of the matrix that begin at `first_row`.

        `part` may be a view of a mapped file: it is copied, or quantised some rows at a time. Gives where it went.
        """
        if not stored.online:
            return self.put(stored.convert(tensor, part, rows), first_row, expert)
        step = max(1, FLOATS // part.shape[1])
        for i in range(0, rows, step):
            into = self.put(
                dict(self._quantize(part[i : i + step], self.fmt.name).named_buffers()), first_row + i, expert
            )
        return into

    def put(self, part: Mapping[str, Tensor], first_row: int = 0, expert: int | None = None) -> Tensor:
        """Some canonical tensors of the part that begins at `first_row`. Gives where the last of them went.

        A fused matrix has one x_scale, the largest of its parts'. Raises WeightError where other tensors without rows differ.
        """
        for name, tensor in part.items():
            step = self._containers[name].rows
            stack = self._stack(name, tensor, step)
            into = stack if expert is None else stack[expert]
            if step is not None:
                into = into.narrow(0, first_row // step, tensor.shape[0]).copy_(tensor)
                continue
            first = (name, expert) not in self._whole
            self._whole.add((name, expert))
            if first:
                into.copy_(tensor)
            elif name == "x_scale":
                into.copy_(torch.maximum(into, tensor))
            elif not torch.equal(into, tensor):
                raise WeightError(f"{self.where}: matrices that run as one have different orders of columns (g_idx)")
        return into

    def _stack(self, name: str, part: Tensor, step: int | None) -> Tensor:
        """Where a canonical tensor is put together; the first part that comes tells its columns, dtype and device."""
        if name not in self._tensors:
            shape = part.shape if step is None else (-(-self.rows // step), *part.shape[1:])
            stacked = shape if self.num_experts is None else (self.num_experts, *shape)
            self._tensors[name] = staging(part, stacked)
        return self._tensors[name]

    def weight(self) -> PackedWeight:
        """The canonical weight. Nothing may be put afterwards."""
        return PackedWeight(
            self.fmt.name,
            self._tensors,
            out_features=self.rows,
            in_features=self.columns,
            num_experts=self.num_experts,
        )


def dequantized_stack(w: PackedWeight, dtype: torch.dtype, dequantize: Callable[..., Tensor]) -> PackedWeight:
    """A canonical stack in the "dense" format, one expert after the other. `dequantize` is the op quant.dequantize."""
    assert w.num_experts is not None, "a stack of experts"
    value = torch.empty(w.num_experts, w.out_features, w.in_features, dtype=dtype, device=w["weight"].device)
    for i in range(w.num_experts):
        value[i] = dequantize(w.expert(i), dtype)
    return dense(value)


def num_bytes(fmt: Fmt, rows: int, columns: int, dtype: torch.dtype, *, of_columns: int, first: bool = True) -> int:
    """Of a canonical matrix that has `columns` of the `of_columns` columns of a checkpoint's; `dtype` is that of a dense one.

    Parts of a fused matrix share the tensors without rows: the `first` counts them.
    """
    total = 0
    for name, c in fmt.containers(columns).items():
        if c.rows is None and not first:
            continue
        shared = fmt.act_order and name in ("scale", "zero")  # any of the columns may be of any group
        shape = fmt.containers(of_columns)[name].shape(rows, of_columns) if shared else c.shape(rows, columns)
        total += math.prod(shape) * (dtype if fmt.is_dense else c.dtype).itemsize
    return total
