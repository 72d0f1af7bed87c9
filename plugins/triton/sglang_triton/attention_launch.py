"""What launches of attention have in common, at run time and ahead of time: constexprs, and what configs are chosen by."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from sglang_core.api.ops import AttnSpec

LONG = 64  # rows of tiles from which on blocks that all rows see whole go without a mask
RAGGED_ROWS = 128  # asked of the config; it says how many it takes
DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def dot_dtype(q: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """What dots take: float32 where either is; float16 where it holds either one's digits better; otherwise bfloat16."""
    if torch.float32 in (q, stored):
        return torch.float32
    halves = (torch.float16, torch.float8_e4m3fn, torch.uint8)
    return torch.float16 if q == torch.float16 or stored in halves else torch.bfloat16


def parts_of(dim: int) -> tuple[int, int]:
    """A head's dims as one power of two, or as two where that leaves less to padding: 192 = 128 + 64. 72 = 64 + 8, padded to 16."""
    low = 1 << (dim.bit_length() - 1)
    rest = dim - low
    if rest and low >= 16 and low + max(16, triton.next_power_of_2(rest)) < 2 * low:
        return low, rest
    return dim, 0


def dims_of(widths: tuple[int, int, int]) -> dict[str, int]:
    """The constexprs of both parts of keys and of values: how wide, and the power of two that holds it."""
    sizes: dict[str, int] = {}
    for name, width in zip(("0", "1", "V"), widths, strict=True):
        sizes |= {f"W{name}": width, f"B{name}": max(16, triton.next_power_of_2(width))}
    return sizes


def mask_of(spec: AttnSpec) -> dict[str, Any]:
    return {"CAUSAL": spec.causal, "WINDOW": spec.window or 0, "SOFT_CAP": spec.soft_cap is not None}


def tile_sizes(rows: int, widths: tuple[int, int, int], dot: torch.dtype, stored: torch.dtype) -> dict[str, int]:
    """What configs are chosen by: rows of a tile, the widest of its dims, bits of what dots take and of what the pool stores."""
    return {"ROWS": rows, "D": max(widths), "BITS": 8 * dot.itemsize, "STORED": 8 * stored.itemsize}


def scale_of(spec: AttnSpec) -> float:
    """Scores in base 2; where they are capped, that happens before."""
    return spec.scale if spec.soft_cap is not None else spec.scale / math.log(2.0)
