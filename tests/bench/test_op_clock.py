"""The op stopwatch, on a clock that the test moves."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.interface import DeviceInfo
from sglang_core.backend.kernel import OpSite
from sglang_core.backend.selection import BoundOp, OpTable
from sglang_core.bench.op_clock import OpClock
from sglang_core.ops.registry import OpDef


class Hand:
    now = 0.0

    def __call__(self) -> float:
        return self.now

    def moves(self, seconds: float) -> None:
        self.now += seconds


def bound(op: str, fn: Any, layer: str = "L") -> BoundOp:
    return BoundOp(site=OpSite(op=op, layer=layer, dtype="float32"), fn=fn, provider="acme", reason="")


def test_ops_are_ranked_by_their_own_time() -> None:
    hand = Hand()
    clock = OpClock(hand)
    inner = clock.instrument(bound("norm.rms", lambda: hand.moves(3))).fn

    def composite() -> None:
        hand.moves(1)
        inner()

    outer = clock.instrument(bound("norm.add_rms", composite)).fn
    outer()
    outer()
    assert [(t.op, t.calls, t.seconds) for t in clock.ranked()] == [("norm.rms", 2, 6.0), ("norm.add_rms", 2, 2.0)]


def test_reset_forgets_and_layers_are_apart() -> None:
    hand = Hand()
    clock = OpClock(hand)
    a = clock.instrument(bound("gemm.linear", lambda: hand.moves(1), "QKV")).fn
    b = clock.instrument(bound("gemm.linear", lambda: hand.moves(2), "Head")).fn
    a()
    clock.reset()
    b()
    assert [(t.layer, t.seconds) for t in clock.ranked()] == [("Head", 2.0)]


def test_arguments_results_and_errors_pass_through() -> None:
    clock = OpClock()
    add = clock.instrument(bound("x.add", lambda a, *, b: a + b)).fn
    assert add(2, b=3) == 5

    def fails() -> None:
        raise ValueError

    broken = clock.instrument(bound("x.fails", fails)).fn
    with pytest.raises(ValueError):
        broken()
    assert add(1, b=1) == 2
    assert {t.op: t.calls for t in clock.ranked()} == {"x.add": 2, "x.fails": 1}


def test_device_is_waited_for_around_each_op() -> None:
    calls: list[str] = []
    clock = OpClock()
    clock.synchronize = lambda: calls.append("sync")
    clock.instrument(bound("x.y", lambda: calls.append("op"))).fn()
    assert calls == ["sync", "op", "sync"]


def test_an_op_table_takes_the_clock() -> None:
    hand = Hand()
    clock = OpClock(hand)
    ops = {"toy.op": OpDef(name="toy.op", body=lambda: hand.moves(4))}
    device = DeviceInfo(backend="cpu", path="cpu", name="test")
    table = OpTable(device, CpuBackend(), ops=ops, kernels=[], instrument=clock.instrument)
    table.bind(OpSite(op="toy.op", layer="L", dtype="float32")).fn()
    [time] = clock.ranked()
    assert (time.op, time.provider, time.seconds) == ("toy.op", "reference", 4.0)
