"""How published checkpoints store a quantised matrix, and what of it becomes the canonical tensors of a rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sglang_core.errors import ConfigError, WeightError
from sglang_core.ops.formats import Container, Fmt
from sglang_core.ops.quant import pack4

Ranges = tuple[tuple[int, int], ...]
Layout = Literal["plain", "awq", "gptq", "gptq_v2", "pack", "nvfp4"]
Wanted = list[
    tuple[str, tuple[int, ...], torch.dtype]
]  # suffix, shape, dtype; any float tensor is cast to a float dtype
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of eight that each nibble of a word holds, lowest first


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A format, and the layout that a checkpoint has it in. `names` maps canonical tensors to suffixes where files differ.

    plain: canonical but for names and shapes of scales. awq: int32[in, out / 8], eight columns a word in AWQ_ORDER, scales and
    zeros [G, out]. gptq: int32[in / 8, out], eight rows a word in order, zeros stored less 1 (gptq_v2: as they are). pack:
    int32[out, in / 8], in order, offset by 8. nvfp4: plain, with global scales; `inverse`: those files store 1 / scale.
    """

    fmt: Fmt
    layout: Layout
    names: Mapping[str, str]
    inverse: bool = False

    def wanted(self, rows: int, columns: int) -> Wanted:
        """The checkpoint's tensors of a matrix [rows, columns]."""
        f32, i32 = torch.float32, torch.int32
        groups = -(-columns // (columns if self.fmt.group == -1 else self.fmt.group or columns))
        if self.layout in ("awq", "gptq", "gptq_v2"):
            word = (columns, rows // 8) if self.layout == "awq" else (columns // 8, rows)
            wanted: Wanted = [
                ("qweight", word, i32),
                ("qzeros", (groups, rows // 8), i32),
                ("scales", (groups, rows), f32),
            ]
            return [*wanted, ("g_idx", (columns,), i32)] if self.fmt.act_order else wanted
        if self.layout == "pack":
            return [("weight_packed", (rows, columns // 8), i32), ("weight_scale", (rows, groups), f32)]
        made: Wanted = []
        for name, c in self.fmt.containers(columns).items():
            shape = c.shape(rows, columns)
            if name == "global_scale" or (name == "scale" and self.fmt.one_scale):
                shape = (1,)
            elif name == "scale" and c.columns is None:
                shape = (rows, 1)
            made.append((self.names[name], shape, c.dtype))
        return made

    def canonical(self, parts: list[Tensor], rows: int, columns: int) -> dict[str, Tensor]:
        """The tensors of `wanted`, in its order -> the canonical ones of the whole matrix."""
        if self.layout == "pack":
            return {"weight": pack4(_words(parts[0])), "scale": parts[1]}
        if self.layout in ("awq", "gptq", "gptq_v2"):
            return self._zero_pointed(parts)
        tensors = dict(zip(self.fmt.containers(columns), parts, strict=True))
        for name in ("global_scale", "x_scale"):
            if self.inverse and name in tensors:
                tensors[name] = 1.0 / tensors[name]
        if self.fmt.one_scale:
            tensors["scale"] = tensors["scale"].reshape(1).repeat(rows)
        elif tensors["scale"].shape[-1] == 1 and self.fmt.group is None:
            tensors["scale"] = tensors["scale"][:, 0].contiguous()
        if "global_scale" in tensors:
            tensors["global_scale"] = tensors["global_scale"].reshape(1).repeat(rows)
        return tensors | ({"x_scale": tensors["x_scale"].reshape(1)} if self.fmt.static else {})

    def _zero_pointed(self, parts: list[Tensor]) -> dict[str, Tensor]:
        qweight, qzeros, scales = parts[:3]
        if self.layout == "awq":
            code, zero = _awq_order(_words(qweight)).t(), _awq_order(_words(qzeros))
        else:
            code, zero = _words(qweight.t()), _words(qzeros)
            zero = zero + 1 if self.layout == "gptq" else zero
        made = {"weight": pack4(code), "scale": scales.t().contiguous(), "zero": zero.t().contiguous()}
        return made | ({"group": parts[3]} if self.fmt.act_order else {})


def _words(x: Tensor) -> Tensor:
    """x: int32[a, b] -> uint8[a, 8b], the eight nibbles of each word, lowest first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=x.device)
    return ((x[..., None] >> shifts) & 15).to(torch.uint8).flatten(-2)


def _awq_order(x: Tensor) -> Tensor:
    """Nibbles of words as AWQ stores them -> in the order of columns."""
    place = [AWQ_ORDER.index(i) for i in range(8)]
    return x.reshape(*x.shape[:-1], -1, 8)[..., place].flatten(-2)


def cut(
    c: Container, fmt: Fmt, size: tuple[int, int], rows: Ranges, columns: tuple[int, int]
) -> tuple[list[slice], slice]:
    """Which of a container's rows and columns hold these of the matrix. Raises ConfigError within a block or group."""
    at_rows = [slice(None)] if c.rows is None else [_steps(r, c.rows, size[0], fmt, "row") for r in rows]
    one_group = c.columns is None or c.columns >= size[1]
    whole = one_group or (fmt.act_order and c.columns not in (1, 2))  # act_order: any column may be of any group
    return at_rows, slice(None) if whole or c.columns is None else _steps(columns, c.columns, size[1], fmt, "column")


def _steps(part: tuple[int, int], step: int, size: int, fmt: Fmt, what: str) -> slice:
    start, stop = part
    if start % step or (stop % step and stop != size):
        raise ConfigError(
            f"{fmt.name} shares a scale or byte between {step} {what}s, and this rank's part [{start}, {stop}) of {size} cuts "
            "through them; set --tp-size to a smaller divisor"
        )
    return slice(start // step, -(-stop // step))


def held(
    fmt: Fmt, tensors: Mapping[str, Tensor], size: tuple[int, int], rows: Ranges, columns: tuple[int, int]
) -> dict[str, Tensor]:
    """Canonical tensors of a matrix of `size` -> of these rows and columns of it, copies."""
    made = {}
    for name, c in fmt.containers(size[1]).items():
        at_rows, at_columns = cut(c, fmt, size, rows, columns)
        by_row = tensors[name] if c.rows is None else torch.cat([tensors[name][at] for at in at_rows])
        made[name] = (by_row if c.columns is None else by_row[..., at_columns]).clone(
            memory_format=torch.contiguous_format
        )
    return made


def joined(fmt: Fmt, parts: list[dict[str, Tensor]], where: str) -> dict[str, Tensor]:
    """Parts of a fused matrix, one below the other. Raises WeightError where they order their columns differently."""
    made = {}
    for name, c in fmt.containers(1).items():
        tensors = [part[name] for part in parts]
        if name == "x_scale":
            made[name] = torch.stack(tensors).amax(0)
        elif c.rows is not None:
            made[name] = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        elif all(torch.equal(t, tensors[0]) for t in tensors):
            made[name] = tensors[0]
        else:
            raise WeightError(f"{where}: matrices that run as one have different orders of columns (g_idx)")
    return made
