"""Collectives over ranks in processes of their own, or over those of a mesh that one process drives: right, and the same bits on all of them.

Sizes are odd on purpose: a kernel's vectors, and a ring's parts, leave a tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sglang_conformance import collectives
from sglang_conformance.case import FLOATS, Case, Outputs, add
from sglang_conformance.env import Env
from sglang_conformance.rank import Program, same_everywhere

DTYPES = (*FLOATS, torch.int32)
FLOAT32 = (torch.float32,)
SHAPES = [(1,), (7,), (3, 65), (2, 4099)]
EMPTY = [(0,), (0, 8), (5, 301)]  # and one that is not: an empty one must leave nothing behind
DEATH_TIMEOUT = 8.0  # seconds; what a backend's communicator is told
# Where steps are compiled, an engine compiles every bucket that its limits allow.
FEW: dict[str, Any] = {"max_running_requests": 2, "context_length": 64, "chunked_prefill_size": 32}
TP_PROMPTS = ["The capital of France is", "1, 2, 3, 4,"]


def ranks(env: Env, program: Program, size: int, args: Mapping[str, Any], *, same: bool) -> Outputs:
    """Every rank's outputs, each under its name and rank; `same`: of equal bits on all ranks."""
    found = env.ranks(program, size, args)
    if same:
        same_everywhere(found, list(found[0]))
    return _named(found)


def _named(found: Mapping[int, Outputs]) -> dict[str, Tensor]:
    return {f"{name}, rank {rank}": x for rank, made in found.items() for name, x in made.items()}


def a_rank_dies(env: Env, size: int) -> Outputs:
    return _named(env.ranks(collectives.a_rank_dies, size, {}, dead=(size - 1,), timeout=DEATH_TIMEOUT))


def engine(env: Env) -> Outputs:
    """Greedy tokens of the demo model over two ranks are those over one."""
    two, one = (env.engine_tokens(TP_PROMPTS, tp_size=size, **FEW) for size in (2, 1))
    assert one == two, f"over one rank {one}, over two {two}"
    return {"equal": torch.ones(1, dtype=torch.int32)}


def comm_case(
    op: str, name: str, program: Program, size: int, *, moves: bool = False, same: bool = True, **more: Any
) -> None:
    """`moves`: it computes nothing, so that every bit must be there."""
    args = more.pop("args")
    exact = _exact(program, size, args) if moves else ()
    add(
        Case(
            op=f"comm.{op}",
            name=f"{name}, {size} ranks",
            run=lambda env: ranks(env, program, size, args, same=same),
            exact=exact,
            **({"dtypes": DTYPES} | more),
        )
    )


def _exact(program: Program, size: int, args: Mapping[str, Any]) -> tuple[str, ...]:
    count = range(len(args["shapes"]))
    title = {"all_gather": "all", "all_to_all": "rows", "ring": "got"}.get(program.__name__)
    made = [f"{title} {i}" for i in count] if title else [f"said {i} by {src}" for i in count for src in range(size)]
    return tuple(f"{name}, rank {rank}" for name in made for rank in range(size))


for size in (2, 3):
    few: dict[str, Any] = {} if size == 2 else {"dtypes": (torch.float32, torch.bfloat16)}
    for name, shapes in (("odd sizes", SHAPES), ("empty", EMPTY)):
        shaped = {"shapes": shapes}
        comm_case("all_reduce", name, collectives.all_reduce, size, args=shaped, **few)
        comm_case("all_gather", name, collectives.all_gather, size, args=shaped | {"dim": -1}, moves=True, **few)
        comm_case("reduce_scatter", name, collectives.reduce_scatter, size, args=shaped | {"dim": 0}, same=False, **few)
        comm_case("all_to_all", name, collectives.all_to_all, size, args=shaped, moves=True, same=False, **few)
        comm_case("broadcast", name, collectives.broadcast, size, args=shaped, moves=True, **few)
        comm_case("p2p", name, collectives.ring, size, args=shaped, moves=True, same=False, **few)
    rows = {"shapes": [(3, 5), (2, 3, 67)]}
    comm_case("all_gather", "by rows", collectives.all_gather, size, args=rows | {"dim": 0}, moves=True, dtypes=FLOAT32)
    comm_case(
        "reduce_scatter",
        "by columns",
        collectives.reduce_scatter,
        size,
        args=rows | {"dim": 1},
        same=False,
        dtypes=FLOAT32,
    )
    comm_case("order", "of one stream", collectives.in_order, size, args={"count": 30}, same=False, dtypes=FLOAT32)
    comm_case("order", "of two streams", collectives.two_streams, size, args={"count": 25}, dtypes=FLOAT32)
    add(
        Case(
            op="comm.failure",
            name=f"a rank dies, {size} ranks",
            dtypes=FLOAT32,
            run=lambda env, n=size: a_rank_dies(env, n),
            exact=tuple(f"heard, rank {rank}" for rank in range(size - 1)),
        )
    )
comm_case("all_reduce", "strides", collectives.strided, 2, args={}, same=False, dtypes=FLOAT32)
comm_case(
    "all_reduce",
    "large",
    collectives.all_reduce,
    2,
    args={"shapes": [(1 << 20,), (4096, 257)]},
    dtypes=FLOAT32,
    full=True,
)
comm_case("all_reduce", "odd sizes", collectives.all_reduce, 4, args={"shapes": SHAPES}, full=True)
add(Case(op="comm.engine", name="demo model", dtypes=FLOAT32, run=engine, exact=("equal",), full=True))
