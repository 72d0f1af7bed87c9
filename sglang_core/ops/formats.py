"""`Fmt`: a named weight format, which includes how activations are quantised, and the canonical tensors that hold it.

For a matrix [out, in]; a stack of experts has them as first dim of every tensor. n4 is two 4-bit codes a byte, uint8[out, in / 2]:
column 2j in the low nibble, 2j + 1 in the high one. G is the number of column groups, ceil(in / g); `g-1` is one group.

| format | weight | scale | more | a weight is | activations |
|---|---|---|---|---|---|
| dense | float [out, in] | | | weight | as they are |
| fp8.tensor | e4m3fn [out, in] | f32 [out], equal within a checkpoint matrix | | weight * scale | e4m3fn, scale a token |
| fp8.tensor.static | same | same | x_scale f32 [1] | same | e4m3fn, divided by x_scale |
| fp8.token_channel | e4m3fn [out, in] | f32 [out] | | same | e4m3fn, scale a token |
| fp8.block128 | e4m3fn [out, in] | f32 [ceil(out / 128), G], g = 128 | | same | e4m3fn, scale a token and 128 columns |
| int8.token_channel | int8 [out, in] | f32 [out] | | weight * scale | int8 in +-127, scale a token |
| int8.token_channel.asym | same | same | | same | int8 in [-128, 127], scale and zero a token |
| int4.awq.gN | n4, 0..15 | f32 [out, G] | zero uint8 [out, G], 0..15 | (weight - zero) * scale | as they are |
| int4.gptq.gN | n4, 0..15 | f32 [out, G] | zero uint8 [out, G], 0..16 | same | as they are |
| int4.gptq.gN.act_order | same | same, G of the whole matrix | same; group int32 [in] | same, by column's group | as they are |
| int4.pack.gN | n4, 0..15 | f32 [out, G] | | (weight - 8) * scale | as they are |
| w4a8_fp8.gN | n4, 0..15 | f32 [out, G] | | (weight - 8) * scale | e4m3fn, scale a token |
| mxfp4.g32 | n4, e2m1 codes | uint8 [out, G], e8m0: 2 ** (scale - 127), 255 NaN | | weight * scale | as they are |
| nvfp4.g16 | n4, e2m1 codes | e4m3fn [out, G] | global_scale f32 [out], equal within a checkpoint matrix |
  weight * scale * global_scale | e2m1, e4m3fn scale a token and 16 columns, float32 scale a token |
| nvfp4.g16.static | same | same | same, and x_scale f32 [1] | same | same, x_scale for the last |
| nvfp4.g16.a16 | same | same | same as nvfp4.g16 | same | as they are |

An e2m1 code is sign * 8 + index into 0, 0.5, 1, 1.5, 2, 3, 4, 6. A dynamic scale belongs to a token, never to the batch: a token's
result does not depend on its neighbours or on padding. A fused matrix has its parts one below the other in every tensor with rows;
of x_scale it takes the largest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from sglang_core.errors import ConfigError

Element = Literal["dense", "fp8", "int8", "int4", "e2m1"]
Activation = Literal["as_is", "fp8", "fp8_static", "fp8_block", "int8", "int8_asym", "nvfp4", "nvfp4_static"]
BLOCK = 128
INT4_GROUPS = (32, 64, 128, -1)
KNOWN = (
    *("dense", "fp8.tensor[.static]", "fp8.token_channel", "fp8.block128", "int8.token_channel[.asym]"),
    *("int4.awq.gN", "int4.gptq.gN[.act_order]", "int4.pack.gN", "w4a8_fp8.gN"),
    *("mxfp4.g32", "nvfp4.g16[.static|.a16]"),
)
_FIXED: Mapping[str, tuple[Element, Activation, int | None]] = {
    "dense": ("dense", "as_is", None),
    "fp8.tensor": ("fp8", "fp8", None),
    "fp8.tensor.static": ("fp8", "fp8_static", None),
    "fp8.token_channel": ("fp8", "fp8", None),
    "fp8.block128": ("fp8", "fp8_block", BLOCK),
    "int8.token_channel": ("int8", "int8", None),
    "int8.token_channel.asym": ("int8", "int8_asym", None),
    "mxfp4.g32": ("e2m1", "as_is", 32),
    "nvfp4.g16": ("e2m1", "nvfp4", 16),
    "nvfp4.g16.static": ("e2m1", "nvfp4_static", 16),
    "nvfp4.g16.a16": ("e2m1", "as_is", 16),
}
_INT4 = re.compile(r"(int4\.awq|int4\.gptq|int4\.pack|w4a8_fp8)\.g(-1|\d+)(\.act_order)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """One tensor of a canonical weight: how many rows and columns of the matrix share an element of it. None: all, no such dim."""

    dtype: torch.dtype
    rows: int | None = 1
    columns: int | None = 1

    def shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """[1] where it has neither rows nor columns."""
        per = [(out_features, self.rows), (in_features, self.columns)]
        return tuple(-(-size // step) for size, step in per if step is not None) or (1,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fmt:
    """A weight format. `group` columns share a scale (-1: all of them; None: rows have one, not groups)."""

    name: str
    element: Element
    activation: Activation
    group: int | None = None

    @classmethod
    def parse(cls, name: str) -> Fmt:
        """Raises ConfigError on a name that is not in the table above."""
        if name in _FIXED:
            element, activation, group = _FIXED[name]
            return cls(name=name, element=element, activation=activation, group=group)
        m = _INT4.fullmatch(name)
        if m is None or int(m[2]) not in INT4_GROUPS or (m[3] and m[1] != "int4.gptq"):
            raise ConfigError(
                f"weight format {name!r} is not known; there are {', '.join(KNOWN)}, with N one of "
                f"{', '.join(map(str, INT4_GROUPS))}"
            )
        activation = "fp8" if m[1] == "w4a8_fp8" else "as_is"
        return cls(name=name, element="int4", activation=activation, group=int(m[2]))

    @property
    def is_dense(self) -> bool:
        return self.element == "dense"

    @property
    def act_order(self) -> bool:
        return self.name.endswith(".act_order")

    @property
    def has_zero(self) -> bool:
        """Whether every group has a zero point of its own; else codes are signed (int4: offset by 8)."""
        return self.name.startswith(("int4.awq", "int4.gptq"))

    @property
    def one_scale(self) -> bool:
        """Whether a whole checkpoint matrix has one scale, repeated for each of its rows."""
        return self.name.startswith("fp8.tensor")

    @property
    def static(self) -> bool:
        """Whether activations are divided by a scale that the checkpoint brings, `x_scale`."""
        return self.activation.endswith("_static")

    def containers(self, in_features: int) -> dict[str, Container]:
        """Every tensor of a matrix in this format, by name. A dense one may have any float dtype."""
        group = in_features if self.group == -1 else self.group
        made: dict[str, Container] = {}
        match self.element:
            case "dense":
                return {"weight": Container(dtype=torch.float32)}
            case "fp8":
                rows = BLOCK if self.group is not None else 1
                made["weight"] = Container(dtype=torch.float8_e4m3fn)
                made["scale"] = Container(dtype=torch.float32, rows=rows, columns=group)
            case "int8":
                made["weight"] = Container(dtype=torch.int8)
                made["scale"] = Container(dtype=torch.float32, columns=None)
            case "int4":
                made["weight"] = Container(dtype=torch.uint8, columns=2)
                made["scale"] = Container(dtype=torch.float32, columns=group)
                if self.has_zero:
                    made["zero"] = Container(dtype=torch.uint8, columns=group)
                if self.act_order:
                    made["group"] = Container(dtype=torch.int32, rows=None)
            case "e2m1":
                nv = self.group == 16
                made["weight"] = Container(dtype=torch.uint8, columns=2)
                made["scale"] = Container(dtype=torch.float8_e4m3fn if nv else torch.uint8, columns=group)
                if nv:
                    made["global_scale"] = Container(dtype=torch.float32, columns=None)
        if self.static:
            made["x_scale"] = Container(dtype=torch.float32, rows=None, columns=None)
        return made
