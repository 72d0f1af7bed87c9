"""Ops over rows: norms, rotation, gated activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_npu_emulation.contract import FLOATS, emulated, require, require_dtype


@emulated("npu_rms_norm")
def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    require_dtype(FLOATS, input=x)
    require(gamma.dtype == x.dtype, f"gamma must be of the input's dtype, {x.dtype}, and is of {gamma.dtype}")
    require(2 <= x.dim() <= 8, f"the input has 2 to 8 dims, not {x.dim()}")
    require(
        gamma.shape == x.shape[-gamma.dim() :], f"gamma has the last dims of {list(x.shape)}, not {list(gamma.shape)}"
    )
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


@emulated("npu_add_rms_norm")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    require(x1.shape == x2.shape and x1.dtype == x2.dtype, "x1 and x2 are of one shape and dtype")
    total = x1 + x2
    y, rstd = rms_norm(total, gamma, epsilon)
    return y, rstd, total


@emulated("npu_rotary_mul")
def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    """Layouts BSND, BNSD, SBND: which one it is shows in how r1 and r2 broadcast. In the dtype of x, as the formula is written."""
    require_dtype(FLOATS, input=x, r1=r1, r2=r2)
    require(rotate is None, "a matrix of rotation is not emulated")
    require(x.dim() == r1.dim() == r2.dim() == 4, "input, r1 and r2 have 4 dims")
    require(
        r1.shape == r2.shape and r1.dtype == r2.dtype == x.dtype, "r1 and r2 are of one shape, and of the input's dtype"
    )
    (b, n, d), (rb, rn) = (x.shape[0], x.shape[2], x.shape[3]), (r1.shape[0], r1.shape[2])
    require(d < 896 and d % 2 == 0 and r1.shape[3] == d, f"D is even and below 896, not {d}")
    require(
        r1.shape[1] == x.shape[1] and rn in (1, n) and rb in (1, b),
        f"r1 {list(r1.shape)} is no 1S1D, BS1D or BSND of {list(x.shape)}",
    )
    require(b < 1000 and n < 1000, f"B and N are below 1000, not {b} and {n}")
    require(bool((r1.abs() <= 1 + 1e-6).all() and (r2.abs() <= 1 + 1e-6).all()), "r1 and r2 lie in [-1, 1]")
    if rotary_mode == "half":
        a, c = x.chunk(2, dim=-1)
        turned = torch.cat([-c, a], dim=-1)
    else:
        require(rotary_mode == "interleave", f"rotary_mode is half or interleave, not {rotary_mode}")
        require(rb == 1 and rn == 1 and b * n < 1000, "interleaved: r1 is 1S1D, and B * N below 1000")
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return r1 * x + r2 * turned


@emulated("npu_swiglu")
def swiglu(x: Tensor, dim: int = -1) -> Tensor:
    require_dtype(FLOATS, input=x)
    gate, up = x.float().chunk(2, dim=dim)
    return (F.silu(gate) * up).to(x.dtype)
