"""Ops whose every row is a result of its own, and what holds of them whatever the numbers are.

A row's result is the same alone and among others, in another place, in a bucket whose padding is NaN, and as a slice of something
wider. To the bit, where a kernel says `batch_invariant`; padding of the same shape changes no bit of anybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sglang_conformance.case import FLOATS, Case, Outputs, Profile, add
from sglang_conformance.env import Env
from sglang_conformance.guard import same_bits

Rows = dict[str, Tensor]  # inputs with a row for each result
Run = Callable[[Rows], Outputs]  # the op over any such rows, everything else being given
Make = Callable[[Env, int], tuple[Rows, Run]]

PARTS = (1, 2, 5, 1, 24)  # rows of the batches that a batch is cut into
REAL, BUCKET = 5, 8
MANY = 70_000  # more than a grid's second and third dim hold on GPUs, and than 16 bits count
ALIGNED, ODD = 16, 3  # elements before a slice
TOGETHER, PADDED, SLICED, ONE, NONE = "alone and together", "padded or not", "sliced", "one row", "no rows"


def alone_and_together(env: Env, op: str, make: Make) -> Outputs:
    """A batch, and its rows in batches of other sizes and at other places there."""
    rows, run = make(env, sum(PARTS))
    together = run(rows)
    ends = torch.tensor(PARTS).cumsum(0).tolist()
    parts = [run({name: x[end - n : end] for name, x in rows.items()}) for n, end in zip(PARTS, ends, strict=True)]
    alone = {name: torch.cat([part[name] for part in parts]) for name in together}
    if env.batch_invariant(op):
        for name, x in together.items():
            assert same_bits(x, alone[name]), f"{op} says batch_invariant, and neighbours change bits of {name}"
    return {**together, **{f"{name}, alone": x for name, x in alone.items()}}


def padded_or_not(env: Env, op: str, make: Make, poisoned: tuple[str, ...]) -> Outputs:
    """A bucket with room for more rows than there are, filled with NaN and with zeros; and no bucket."""
    rows, run = make(env, BUCKET)

    def filled(value: float) -> Outputs:
        given = {name: x.clone() for name, x in rows.items()}
        for name in poisoned:
            given[name][REAL:] = value
        return {name: y[:REAL] for name, y in run(given).items()}

    padded, zeros = filled(float("nan")), filled(0.0)
    unpadded = run({name: x[:REAL] for name, x in rows.items()})
    for name, x in padded.items():
        assert same_bits(x, zeros[name]), f"{op}: what padding holds changes bits of {name} of other rows"
        if env.batch_invariant(op):
            assert same_bits(x, unpadded[name]), f"{op} says batch_invariant, and padding changes bits of {name}"
    return {**{f"{name}, padded": x for name, x in padded.items()}, **unpadded}


def whole(env: Env, make: Make, count: int) -> Outputs:
    rows, run = make(env, count)
    return run(rows)


def sliced(env: Env, make: Make, names: tuple[str, ...], offset: int) -> Outputs:
    """Inputs that are slices of wider tensors, whose other elements are NaN."""
    rows, run = make(env, 7)
    return run({name: env.sliced(x, offset) if name in names else x for name, x in rows.items()})


def add_rows(
    op: str,
    make: Make,
    *,
    name: str = "",
    odd: Make | None = None,
    many: Make | None = None,
    poisoned: tuple[str, ...] = ("x",),
    strided: tuple[str, ...] | None = None,
    exact: tuple[str, ...] = (),
    relations: tuple[str, ...] = (TOGETHER, PADDED, SLICED, ONE, NONE),
    **facts: Any,
) -> None:
    """The cases of an op whose rows `make` makes.

    `odd`: of sizes that are no multiples of anything; `many`: so narrow that there may be MANY. `poisoned` inputs hold NaN in
    padding, `strided` ones (the same, unless given) may be slices. `exact` names outputs.
    """
    strided = poisoned if strided is None else strided
    kinds: Mapping[str, tuple[Callable[[Env], Outputs], Profile]] = {
        TOGETHER: (lambda env: alone_and_together(env, op, make), "core"),
        PADDED: (lambda env: padded_or_not(env, op, make, poisoned), "core"),
        SLICED: (lambda env: sliced(env, make, strided, ALIGNED), "core"),
        ONE: (lambda env: whole(env, make, 1), "core"),
        NONE: (lambda env: whole(env, make, 0), "core"),
    }
    cases = {kind: kinds[kind] for kind in relations if strided or kind != SLICED}
    if odd is not None:
        cases["odd sizes, a few rows"] = (lambda env: whole(env, odd, 5), "odd_sizes")
        if strided:
            cases["sliced at odd places"] = (lambda env: sliced(env, odd, strided, ODD), "odd_sizes")
    if many is not None:
        cases[f"{MANY} rows"] = (lambda env: whole(env, many, MANY), "core")
    every = tuple(f"{output}{suffix}" for output in exact for suffix in ("", ", alone", ", padded"))
    for kind, (run, profile) in cases.items():
        add(
            Case(
                op=op,
                name=f"{name}, {kind}" if name else kind,
                run=run,
                profile=profile,
                exact=every,
                full=kind.startswith(str(MANY)),
                **({"dtypes": FLOATS} | facts),
            )
        )
