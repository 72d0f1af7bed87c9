"""How checkpoints store a quantised matrix: which tensors, which part of each a rank reads, and what they become."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sglang_core.errors import ConfigError
from sglang_core.ops.formats import Container, Fmt
from sglang_core.ops.quant import INT4_ZERO, pack4

Ranges = tuple[tuple[int, int], ...]
Layout = Literal["plain", "dense", "awq", "gptq", "gptq_v2", "pack", "codes8", "nvfp4", "mxfp4"]
Axis = tuple[int, int] | None  # a tensor's dim that runs over rows (or columns), and how many of them an element covers
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of eight that each nibble of a word holds, lowest first
WORD = 8  # 4-bit codes in an int32


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor that a checkpoint has of a matrix; it becomes the canonical tensor `name`."""

    name: str
    suffix: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # any float tensor is cast to a float dtype
    rows: Axis = None
    columns: Axis = None
    align: int = 1  # columns between whose multiples it may be cut, where an element alone would allow more

    def part(self, rows: Ranges, columns: tuple[int, int], size: tuple[int, int], fmt: Fmt) -> tuple[int, Ranges]:
        """The dim and ranges that hold these rows, or these columns, of a matrix of `size`.

        Raises ConfigError where that would cut an element.
        """
        if self.columns is not None and columns != (0, size[1]):
            assert self.rows is None or rows == ((0, size[0]),), "a rank holds some rows, or some columns"
            dim, step = self.columns
            _steps(columns, math.lcm(step, self.align), size[1], fmt, "columns")
            return dim, (_steps(columns, step, size[1], fmt, "columns"),)
        if self.rows is not None:
            dim, step = self.rows
            return dim, tuple(_steps(part, step, size[0], fmt, "rows") for part in rows)
        return 0, ((0, self.shape[0]),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A format, and the layout that a checkpoint has it in. `names` maps canonical tensors to suffixes where files differ.

    plain: canonical but for names and shapes of scales. dense: floats, quantised to `fmt` as they are read. awq:
    int32[in, out / 8], eight columns a word in AWQ_ORDER, scales and zeros [G, out]. gptq: int32[in / 8, out], eight rows a
    word in order, zeros stored less 1 (gptq_v2: as they are). pack: int32[out, in / 8], in order, offset by 8. codes8: int4 as
    int8[out, in] in -8..7. nvfp4: plain, with global scales; `inverse`: those files store 1 / scale. mxfp4: stacks of experts only, which `layers/moe.py` reads.
    """

    fmt: Fmt
    layout: Layout
    names: Mapping[str, str] = field(default_factory=dict)
    inverse: bool = False

    @property
    def online(self) -> bool:
        """Whether the checkpoint has floats that are quantised as they are read."""
        return self.layout == "dense" and not self.fmt.is_dense

    def tensors(self, rows: int, columns: int, dtype: torch.dtype) -> list[StoredTensor]:
        """The checkpoint's tensors of a matrix [rows, columns]; `dtype`, the model's, is that of floats."""
        assert self.layout != "mxfp4", "a stack of experts is no matrix"
        match self.layout:
            case "dense":
                step = _common_step(self.fmt, columns)
                return [stored_tensor("weight", "weight", (rows, columns), dtype, (0, 1), (1, 1), align=step)]
            case "awq" | "gptq" | "gptq_v2":
                return self._zero_pointed(rows, columns)
            case "pack" | "codes8":
                scales = (rows, -(-columns // self._group(columns)))
                weight = stored_tensor(
                    "weight", "weight_packed", (rows, columns // WORD), torch.int32, (0, 1), (1, WORD)
                )
                if self.layout == "codes8":
                    weight = stored_tensor("weight", "weight", (rows, columns), torch.int8, (0, 1), (1, 1), align=2)
                return [
                    weight,
                    stored_tensor("scale", "weight_scale", scales, torch.float32, (0, 1), self._by_group(1, columns)),
                ]
        return [self._plain(name, c, rows, columns) for name, c in self.fmt.containers(columns).items()]

    def convert(self, tensor: StoredTensor, part: Tensor, rows: int) -> dict[str, Tensor]:
        """What a rank read of one of `tensors`, for `rows` rows -> the canonical tensors that it becomes."""
        assert not self.online, "floats are no format's tensors yet"
        name = tensor.name
        if self.layout in ("awq", "gptq", "gptq_v2"):
            return {name: self._from_words(name, part)}
        if self.layout == "pack" and name == "weight":
            return {name: pack4(_words(part))}
        if self.layout == "codes8" and name == "weight":
            return {name: pack4(part + INT4_ZERO)}
        if self.inverse and name in ("global_scale", "x_scale"):
            part = 1.0 / part
        if name == "global_scale" or (name == "scale" and self.fmt.one_scale):
            part = part.reshape(1).repeat(rows)
        elif name == "scale" and self.fmt.group is None:
            part = part.reshape(rows)
        elif name == "x_scale":
            part = part.reshape(1)
        return {name: part}

    def row_step(self, columns: int) -> int:
        """Ranks cut between multiples of so many rows, for files and for canonical tensors alike."""
        if self.layout == "mxfp4":
            return 1
        tensors = self.tensors(WORD, columns, torch.float32)
        held = [c.rows for c in self.fmt.containers(columns).values() if c.rows is not None]
        return math.lcm(*(t.rows[1] for t in tensors if t.rows is not None), *held)

    def column_step(self, columns: int) -> int:
        """Ranks cut between multiples of so many columns."""
        if self.layout == "mxfp4":
            return self._group(columns)
        tensors = self.tensors(WORD, columns, torch.float32)
        return math.lcm(*(math.lcm(t.columns[1], t.align) for t in tensors if t.columns is not None))

    def _group(self, columns: int) -> int:
        group = self.fmt.group
        return columns if group is None or group == -1 else group

    def _by_group(self, dim: int, columns: int) -> Axis:
        return (dim, self._group(columns)) if self._group(columns) < columns else None

    def _zero_pointed(self, rows: int, columns: int) -> list[StoredTensor]:
        f32, i32, awq = torch.float32, torch.int32, self.layout == "awq"
        groups = -(-columns // self._group(columns))
        by_group = None if self.fmt.act_order else self._by_group(0, columns)  # act_order: any column, any group
        words = (columns, rows // WORD) if awq else (columns // WORD, rows)
        by_word = ((1, WORD), (0, 1)) if awq else ((1, 1), (0, WORD))
        made = [
            stored_tensor("weight", "qweight", words, i32, *by_word),
            stored_tensor("zero", "qzeros", (groups, rows // WORD), i32, (1, WORD), by_group),
            stored_tensor("scale", "scales", (groups, rows), f32, (1, 1), by_group),
        ]
        return [*made, stored_tensor("group", "g_idx", (columns,), i32, None, (0, 1))] if self.fmt.act_order else made

    def _from_words(self, name: str, part: Tensor) -> Tensor:
        if name == "group":
            return part
        if name == "scale":
            return part.t().contiguous()
        if self.layout == "awq":
            by_row = _awq_order(_words(part)).t()
            return pack4(by_row) if name == "weight" else by_row.contiguous()
        if name == "weight":
            return pack4(_words(part.t()))
        return (_words(part) + (1 if self.layout == "gptq" else 0)).t().contiguous()

    def _plain(self, name: str, c: Container, rows: int, columns: int) -> StoredTensor:
        shape = c.shape(rows, columns)
        by_row = None if c.rows is None else (0, c.rows)
        by_column = (1, c.columns) if c.columns is not None and c.columns < columns else None
        if name == "global_scale" or (name == "scale" and self.fmt.one_scale):
            shape, by_row = (1,), None
        elif name == "scale" and c.columns is None:
            shape = (rows, 1)
        return stored_tensor(name, self.names[name], shape, c.dtype, by_row, by_column)


DENSE = Stored(fmt=Fmt.parse("dense"), layout="dense")


def check_stacked(fmt: Fmt, parts: list[int], where: str) -> None:
    """Raises ConfigError where parts of so many rows, one below the other, would share a scale."""
    for c in fmt.containers(1).values():
        if any(rows % (c.rows or 1) for rows in parts[:-1]):
            raise ConfigError(
                f"{where}: {fmt.name} shares a scale between {c.rows} rows, and parts of {', '.join(map(str, parts))} rows "
                "cannot be laid one below the other; set a smaller --tp-size"
            )


def stored_tensor(
    name: str,
    suffix: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rows: Axis = None,
    columns: Axis = None,
    *,
    align: int = 1,
) -> StoredTensor:
    return StoredTensor(name=name, suffix=suffix, shape=shape, dtype=dtype, rows=rows, columns=columns, align=align)


def _common_step(fmt: Fmt, columns: int) -> int:
    """Columns between whose multiples a matrix is quantised as its parts are."""
    return math.lcm(*(c.columns for c in fmt.containers(columns).values() if c.columns and c.columns < columns))


def _words(x: Tensor) -> Tensor:
    """x: int32[a, b] -> uint8[a, 8b], the eight nibbles of each word, lowest first."""
    made = x.new_empty(*x.shape, WORD, dtype=torch.uint8)
    for i in range(WORD):  # one at a time: all eight shifted at once would take 32 bytes a nibble
        made[..., i] = (x >> (4 * i)) & 15
    return made.flatten(-2)


def _awq_order(x: Tensor) -> Tensor:
    """Nibbles of words as AWQ stores them -> in the order of columns."""
    place = [AWQ_ORDER.index(i) for i in range(WORD)]
    return x.reshape(*x.shape[:-1], -1, WORD)[..., place].flatten(-2)


def _steps(part: tuple[int, int], step: int, size: int, fmt: Fmt, what: str) -> tuple[int, int]:
    start, stop = part
    if start % step or (stop % step and stop != size):
        raise ConfigError(
            f"{fmt.name} shares a scale or a word between {step} {what}, and this rank's part [{start}, {stop}) of {size} cuts "
            "through them; set --tp-size to a smaller divisor"
        )
    return start // step, -(-stop // step)
