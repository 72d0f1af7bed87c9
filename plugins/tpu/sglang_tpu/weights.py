"""Quantised weights as the Pallas products read them: packed once on the host at load, widened in a kernel's registers and nowhere else.

Rows and columns are filled up to multiples of 128 with codes that meet zeros only. 8-bit codes stay [out, in]: the MXU takes a
transposed operand. 4-bit codes are eight to an int32, [in / 8, out], so that two masks of a word give two bfloat16 numbers in the order of
rows that `pltpu.bitcast` has them. Scales and zeros are [groups, out]: a group's is a row, which is broadcast for nothing.
A stack of experts has them as first dim of every tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sglang_core.api.ops import Fmt, PackedWeight

LAYOUT = "tpu.tiles"
LANES = 128
CHUNKS = (512, 256, 128)  # of columns that a kernel multiplies at a time
PARTS = 4  # of a chunk of 4-bit codes: a word holds two neighbours of each
HALVES = 2


def ceil_to(size: int, step: int) -> int:
    return -(-size // step) * step


def chunk_of(columns: int) -> int:
    """How many of the columns, a multiple of 128, are multiplied at a time."""
    return next(chunk for chunk in CHUNKS if columns % chunk == 0)


def pack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """Canonical -> tiles. With `out`, an earlier result, its bytes are rewritten."""
    if w.num_experts is None:
        made = _packed(w)
    else:
        made = {}
        for i in range(w.num_experts):  # one at a time: codes lie open on the way
            for name, tensor in _packed(w.expert(i)).items():
                stack = made.setdefault(name, tensor.new_empty(w.num_experts, *tensor.shape))
                stack[i] = tensor
    if out is not None:
        for name, tensor in made.items():
            out[name].copy_(tensor)
        return out
    return _weight(w, made, LAYOUT)


def unpack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """The inverse of `pack`, bit for bit."""
    tensors = {name: t for name, t in w._buffers.items() if t is not None}
    if w.num_experts is None:
        made = _canonical(w, tensors)
    else:
        each = [_canonical(w, {name: t[i] for name, t in tensors.items()}) for i in range(w.num_experts)]
        made = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    if out is not None:
        for name, tensor in made.items():
            out[name].copy_(tensor)
        return out
    return _weight(w, made, "canonical")


def _weight(like: PackedWeight, tensors: dict[str, Tensor], layout: str) -> PackedWeight:
    return PackedWeight(
        like.fmt,
        tensors,
        out_features=like.out_features,
        in_features=like.in_features,
        num_experts=like.num_experts,
        layout=layout,
    )


def _packed(w: PackedWeight) -> dict[str, Tensor]:
    """One matrix."""
    fmt = Fmt.parse(w.fmt)
    rows, columns = ceil_to(w.out_features, LANES), ceil_to(w.in_features, LANES)
    made: dict[str, Tensor] = {}
    for name, container in fmt.containers(w.in_features).items():
        tensor = w[name]
        if name == "x_scale":
            made[name] = tensor
        elif name == "weight":
            codes = _as_bytes(tensor, partial(_padded, rows=rows, columns=columns // (container.columns or 1)))
            made[name] = _words(codes, chunk_of(columns)) if container.columns == 2 else codes
        else:
            groups = 1 if container.columns in (None, w.in_features) else -(-columns // container.columns)
            made[name] = _as_bytes(tensor, partial(_by_group, rows_each=container.rows or 1, groups=groups, rows=rows))
    if fmt.activation == "int8_asym":
        made["column_sum"] = made["weight"].sum(1, dtype=torch.int32)[None]
    return made


def _canonical(w: PackedWeight, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    fmt = Fmt.parse(w.fmt)
    made = {}
    for name, container in fmt.containers(w.in_features).items():
        tensor, shape = tensors[name], container.shape(w.out_features, w.in_features)
        if name == "x_scale":
            made[name] = tensor.clone()
        elif name == "weight":
            codes = _from_words(tensor, chunk_of(tensor.shape[0] * 8)) if container.columns == 2 else tensor
            made[name] = _as_bytes(codes, partial(_cut, shape=shape))
        else:
            made[name] = _as_bytes(tensor, partial(_from_groups, rows_each=container.rows or 1, shape=shape))
    return made


def _as_bytes(x: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """fn of a tensor that moves elements only, some of whose dtypes PyTorch moves as bytes alone."""
    return fn(x.view(torch.uint8)).view(x.dtype) if x.element_size() == 1 else fn(x)


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    made = x.new_zeros(rows, columns)
    made[: x.shape[0], : x.shape[1]] = x
    return made


def _by_group(x: Tensor, *, rows_each: int, groups: int, rows: int) -> Tensor:
    """x: [ceil(out / rows_each), G] or [out] -> [groups, rows]; each element stands for so many rows."""
    x = (x if x.ndim == 2 else x[:, None]).repeat_interleave(rows_each, dim=0)[:rows]
    return _padded(x, rows, groups).T.contiguous()


def _from_groups(x: Tensor, *, rows_each: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_by_group`."""
    return _cut(x.T[::rows_each], shape=(shape[0], shape[1] if len(shape) == 2 else 1)).reshape(shape)


def _cut(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    return x[: shape[0], : shape[1]].contiguous()


def _words(packed: Tensor, chunk: int) -> Tensor:
    """packed: uint8[out, in / 2], canonical -> int32[in / 8, out].

    Of a chunk of columns, word i has in bits 16 h + 4 s the column (chunk / 4) s + 2 i + h.
    """
    code = torch.stack([packed & 15, packed >> 4], dim=-1).view(packed.shape[0], -1, PARTS, chunk // 8, HALVES)
    word = code.new_zeros(packed.shape[0], code.shape[1], chunk // 8, dtype=torch.int32)
    for part in range(PARTS):
        for half in range(HALVES):
            word |= code[:, :, part, :, half].int() << (16 * half + 4 * part)
    return word.flatten(1).T.contiguous()


def _from_words(words: Tensor, chunk: int) -> Tensor:
    """The inverse of `_words`."""
    word = words.T.reshape(words.shape[1], -1, chunk // 8)
    code = word.new_empty(*word.shape[:2], PARTS, chunk // 8, HALVES, dtype=torch.uint8)
    for part in range(PARTS):
        for half in range(HALVES):
            code[:, :, part, :, half] = (word >> (16 * half + 4 * part)) & 15
    pairs = code.view(words.shape[1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)
