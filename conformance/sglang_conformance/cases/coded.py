"""Norms and activations that give codes, and linear layers that take them.

A code is turned by the last bit of what is quantised, so codes of half types are held against what the device's own norm or
activation gives, to within a code; those of float32, where there is hardly such a bit, against the oracle too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.cases.dense import linear_site
from sglang_conformance.cases.rows import Rows, Run, add_rows
from sglang_conformance.env import Env
from sglang_conformance.guard import same_bits
from sglang_core.ops.codes import CODE_KINDS, CodeKind, Codes, coded, decoded

EPS = 1e-5
FORMATS = {"fp8": "fp8.token_channel", "fp8_block": "fp8.block128", "int8": "int8.token_channel"}


def numbers(env: Env, codes: Codes, plain: Tensor, kind: CodeKind) -> dict[str, Tensor]:
    """What codes stand for, once each was found within a code of its number in `plain`."""
    assert codes.dtype == plain.dtype and codes.code.shape == plain.shape
    assert codes.code.dtype == (torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    like = coded(plain, kind)
    assert codes.scale.shape == like.scale.shape and codes.scale.dtype == torch.float32
    got, want = decoded(codes).float(), decoded(like).float()
    whole = want.abs().amax(-1, keepdim=True) if plain.numel() else want
    # A code of int8 is 1 / 127 of the largest number of a row; one of e4m3 an eighth of its own, or 2^-9 scales.
    slack = whole / 120 if kind == "int8" else want.abs() / 7 + whole / 448 / 256
    near = ((got - want).abs() <= slack) | plain.isnan()  # what padding holds has no codes to speak of
    assert bool(near.all()), "codes are not of what the op gives"
    return {"numbers": got} if env.dtype == torch.float32 else {}


def norm_rows(env: Env, rows: int, kind: CodeKind, width: int = 512) -> tuple[Rows, Run]:
    op = env.op("norm.add_rms_quant", fmt=kind, dims={"M": width})
    plain, weight = env.op("norm.add_rms", dims={"M": width}), env.normal(width)

    def run(given: Rows) -> Outputs:
        codes, residual = op(given["x"], given["residual"], weight, EPS, kind)
        y, _ = plain(given["x"], given["residual"], weight, EPS)
        return {"residual": residual, **numbers(env, codes, y, kind)}

    return {"x": env.normal(rows, width), "residual": env.normal(rows, width, scale=3.0)}, run


def gated_rows(env: Env, rows: int, kind: CodeKind, width: int = 384) -> tuple[Rows, Run]:
    op = env.op("act.gated_quant", fmt=kind, dims={"F": width})
    plain = env.op("act.gated", dims={"F": width})

    def run(given: Rows) -> Outputs:
        y = plain(given["x"], "silu")
        return {"y": y, **numbers(env, op(given["x"], "silu", kind), y, kind)}

    return {"x": env.normal(rows, 2 * width)}, run


MAKERS: dict[str, tuple[Callable[..., tuple[Rows, Run]], tuple[str, ...], tuple[str, ...]]] = {
    "norm.add_rms_quant": (norm_rows, ("x", "residual"), ("residual",)),
    "act.gated_quant": (gated_rows, ("x",), ()),
}
for op, (make, inputs, exact) in MAKERS.items():
    for kind in CODE_KINDS:
        add_rows(
            op,
            lambda env, rows, make=make, kind=kind: make(env, rows, kind),
            name=kind,
            odd=lambda env, rows, make=make, kind=kind: make(env, rows, kind, 333),
            poisoned=inputs,
            exact=exact,
        )


def product(env: Env, kind: CodeKind, rows: int, width: int, out: int) -> Outputs:
    """A linear layer gives the same bits of activations and of what it would quantise them to itself."""
    site = linear_site(env, width, out, FORMATS[kind])
    linear = env.op("gemm.linear", fmt=site.fmt, dims=site.dims)
    w, x, bias = env.weight(out, width, site), env.normal(rows, width), env.normal(out)
    y = linear(x, w, bias)
    if env.takes_codes("gemm.linear"):
        codes = coded(x, kind)
        assert same_bits(linear(codes, w, bias), y), "codes of activations give another product than activations"
    return {"y": y}


SIZES: Sequence[tuple[str, tuple[int, int, int], Profile]] = (
    ("one row", (1, 256, 128), "core"),
    ("rows", (70, 512, 384), "core"),
    ("odd sizes", (5, 333, 77), "odd_sizes"),
)
for kind, fmt in FORMATS.items():
    for name, sizes, profile in SIZES:
        add(
            Case(
                op="gemm.linear",
                name=f"{fmt} of codes, {name}",
                fmt=fmt,
                profile=profile,
                run=lambda env, k=kind, s=sizes: product(env, k, *s),
            )
        )
