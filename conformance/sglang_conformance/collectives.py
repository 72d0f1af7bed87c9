"""Programs of ranks: what each collective is asked to do. `shapes` and the like are the same on every rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sglang_conformance.rank import Rank
from sglang_core.backend.communicator import Communicator

Shapes = Sequence[Sequence[int]]
Made = Mapping[str, Tensor]
LATE = 5.0  # seconds that an error may come after the time that a collective is given: a loaded host


def all_reduce(rank: Rank, shapes: Shapes) -> Made:
    """The sums of all shapes as one output: a sum of half types is rounded once a rank, and few numbers say little about that."""
    sums = []
    for shape in shapes:
        sums.append(rank.comm.all_reduce(rank.numbers(*shape)))
        _check_shape(sums[-1], shape)
    return {"sums": torch.cat([x.flatten() for x in sums])}


def _check_shape(x: Tensor, shape: Sequence[int]) -> None:
    assert list(x.shape) == list(shape), f"the result is {list(x.shape)} and must be {list(shape)}"


def all_gather(rank: Rank, shapes: Shapes, dim: int) -> Made:
    return {f"all {i}": rank.comm.all_gather(rank.numbers(*shape), dim=dim) for i, shape in enumerate(shapes)}


def reduce_scatter(rank: Rank, shapes: Shapes, dim: int) -> Made:
    """Each shape is of what a rank keeps."""
    parts = []
    for shape in shapes:
        whole = list(shape)
        whole[dim] *= rank.size
        parts.append(rank.comm.reduce_scatter(rank.numbers(*whole), dim=dim))
        _check_shape(parts[-1], shape)
    return {"parts": torch.cat([x.flatten() for x in parts])}


def all_to_all(rank: Rank, shapes: Shapes) -> Made:
    return {f"rows {i}": rank.comm.all_to_all(rank.numbers(rank.size, *shape)) for i, shape in enumerate(shapes)}


def broadcast(rank: Rank, shapes: Shapes) -> Made:
    """From every rank in turn."""
    return {
        f"said {i} by {src}": rank.comm.broadcast(rank.numbers(*shape), src=src)
        for i, shape in enumerate(shapes)
        for src in range(rank.size)
    }


def ring(rank: Rank, shapes: Shapes) -> Made:
    """Every rank sends to the next one; the first breaks the circle by sending before it receives."""
    after, before = (rank.rank + 1) % rank.size, (rank.rank - 1) % rank.size
    made = {}
    for i, shape in enumerate(shapes):
        mine, theirs = rank.numbers(*shape), rank.place(torch.zeros(*shape, dtype=rank.dtype))
        if rank.rank == 0:
            rank.comm.send(mine, after)
            made[f"got {i}"] = rank.comm.recv(theirs, before)
        else:
            made[f"got {i}"] = rank.comm.recv(theirs, before).clone()
            rank.comm.send(mine, after)
    return made


def strided(rank: Rank) -> Made:
    """Every other column, and a transposed matrix: right, or refused in words, and never wrong."""
    x = rank.numbers(6, 10)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": rank.comm.all_reduce,
        "all": lambda v: rank.comm.all_gather(v, dim=0),
        "part": rank.comm.reduce_scatter,
        "said": rank.comm.broadcast,
    }
    made = {}
    for name, view in (("columns", slice(None, None, 2)), ("transposed", None)):
        for title, call in calls.items():
            wanted, given = ((y[:, view] if view else y.T) for y in (x.clone(), x.clone()))
            want = call(wanted.contiguous())
            try:
                made[f"{title} of {name}"] = call(given)
            except (ValueError, RuntimeError) as e:
                if "contiguous" not in str(e):
                    raise AssertionError(f"{title} of {name} is refused, and not with the word 'contiguous'") from e
                made[f"{title} of {name}"] = want
    return made


def in_order(rank: Rank, count: int) -> Made:
    """Many collectives with nothing in between but the device's own order: kinds and sizes change, and none overtakes another."""
    x = rank.numbers(37)
    for i in range(count):
        mine = x[: 5 + 7 * i % 32]
        total = rank.comm.all_reduce(mine.clone())
        wide = rank.comm.all_gather(mine, dim=0)
        said = rank.comm.broadcast(mine.clone(), src=i % rank.size)
        x[: len(mine)] = (total + wide[: len(mine)] - said) / (rank.size + 2)
    return {"x": x}


def two_streams(rank: Rank, count: int) -> Made:
    """Two streams, each with a communicator of its own: what they do in the meantime is the other's business."""
    comms: list[Communicator] = [rank.another(), rank.another()]
    values = [rank.numbers(33), rank.numbers(1025)]
    streams = [rank.stream() for _ in comms]

    def once(which: int) -> None:
        values[which] = comms[which].all_reduce(values[which].clone()) / rank.size

    try:
        works = [stream.submit(once, which) for _ in range(count) for which, stream in enumerate(streams)]
        for work in works:
            work.result(timeout=rank.timeout)
        rank.runtime.synchronize()
    finally:
        for stream in streams:
            stream.close()
    return {f"stream {which}": value for which, value in enumerate(values)}


def a_rank_dies(rank: Rank) -> Made:
    """The last rank ends without a word. The others hear of it in an error, in the time that a collective may take."""
    x = rank.numbers(64)
    rank.comm.all_reduce(x.clone())
    rank.runtime.synchronize()
    if rank.rank == rank.size - 1:
        rank.die()
    start = time.monotonic()
    try:
        while True:
            rank.comm.all_reduce(x.clone())
            rank.runtime.synchronize()
            took = time.monotonic() - start
            assert took < rank.timeout + LATE, "a rank has died, and all_reduce goes on without it"
    except AssertionError:
        raise
    except Exception:
        took = time.monotonic() - start
    assert took < rank.timeout + LATE, f"a rank died, and the others heard of it after {took:.0f} s"
    return {"heard": torch.ones(1, dtype=torch.int32)}
