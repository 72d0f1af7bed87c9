"""Random weights. A parameter's values depend on its name and the seed only, so every tp_size gives the same model."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from sglang_core.layers.build import WeightSpec

CHUNK = 1 << 20  # values drawn with one seed: a rank draws only the chunks that its rows touch


def dummy_part(spec: WeightSpec, seed: int) -> list[Tensor]:
    """What a checkpoint would give for `spec`: one tensor a range, float32 on the host."""
    dim, ranges = (spec.dim, spec.ranges) if spec.ranges is not None else (0, ((0, spec.shape[0]),))
    if dim == 0:
        return [_rows(spec, seed, start, stop) for start, stop in ranges]
    whole = _rows(spec, seed, 0, spec.shape[0])
    return [whole.narrow(dim, start, stop - start) for start, stop in ranges]


def _rows(spec: WeightSpec, seed: int, start: int, stop: int) -> Tensor:
    shape = (stop - start, *spec.shape[1:])
    if spec.init != "normal":
        return torch.full(shape, float(spec.init == "ones"), dtype=torch.float32, device="cpu")
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    rows_a_chunk = max(1, CHUNK // max(1, torch.Size(spec.shape[1:]).numel()))
    for chunk in range(start // rows_a_chunk, -(-stop // rows_a_chunk)):
        first = chunk * rows_a_chunk
        rows = min(rows_a_chunk, spec.shape[0] - first)
        values = torch.empty((rows, *spec.shape[1:]), dtype=torch.float32, device="cpu")
        bound = 3**0.5 * spec.scale  # uniform: drawn three times as fast as a normal, with the same deviation
        values.uniform_(-bound, bound, generator=_generator(spec.name, seed, chunk))
        low, high = max(start, first), min(stop, first + rows)
        out[low - start : high - start] = values[low - first : high - first]
    return out


def _generator(name: str, seed: int, chunk: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{chunk}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
