"""`sweep`: what it drops, what it keeps, and what it takes for the best. A kernel whose behaviour its config decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sglang_core.backend.interface import RuntimeContext
from sglang_core.backend.kernel import Kernel, OpSite
from sglang_core.backend.selection import BoundOp
from sglang_core.backend.torch_runtime import TorchRuntime
from sglang_core.backend.tuning import Choice, Config, Knob, Tuner
from sglang_core.bench.op_calls import OpCall
from sglang_core.bench.tune import Search, sweep
from sglang_core.errors import DeviceError

KNOB = Knob("acme.tiles", (("T", 1),))
RIGHT, WRONG, RAISES, IDLE = range(4)  # IDLE: writes nothing, so that memory holds what the call before left


class Device(TorchRuntime):
    """Takes the seconds that the config in use says, for the call at hand."""

    def __init__(self, tuner: Acme) -> None:
        super().__init__(RuntimeContext(devices=()))
        self.tuner = tuner
        self.replayed: list[bool] = []

    def time_calls(self, call: Callable[[], object], *, repeats: int, replayed: bool = False) -> list[float]:
        call()
        self.replayed.append(replayed)
        return [self.tuner.config["ms"] / 1e3] * (repeats - 1) + [1e9]  # an outlier, which a median does not see


class Acme(Tuner):
    """One knob. Candidates are given; kernels look at `config`."""

    source = "a list"

    def __init__(self, *candidates: Config, in_force: Config | None = None, unfit: int = 0) -> None:
        self.in_force = self.config = in_force or {"does": RIGHT, "ms": 10}
        self.candidates, self.unfit = candidates, unfit
        self.memory = torch.zeros(4)

    def choices(self, call: Callable[[], object]) -> list[Choice]:
        call()
        return [Choice(knob=KNOB, in_force=self.in_force, candidates=self.candidates, unfit=self.unfit)]

    @contextmanager
    def using(self, knob: Knob, config: Config) -> Iterator[None]:
        assert knob == KNOB
        self.config = config
        yield
        self.config = self.in_force

    def write(self, best: Mapping[Knob, Config], about: Mapping[str, str]) -> Path:
        raise NotImplementedError

    def kernel(self, x: Tensor) -> Tensor:
        match self.config["does"]:
            case 0:  # RIGHT
                self.memory.copy_(2 * x)
            case 1:  # WRONG
                self.memory.copy_(2.01 * x)
            case 2:  # RAISES
                raise MemoryError("shared memory")
        return self.memory.clone()

    def call(self, *, features: frozenset[str] = frozenset()) -> OpCall:
        one = Kernel("act.gated", provider="acme", fn="a:b", device=("*",), features=features)
        site = OpSite(op="act.gated", layer="L", dtype="float32")
        bound = BoundOp(site=site, fn=self.kernel, provider="acme", reason="", kernels=(one,))
        xs = torch.arange(1.0, 5.0), -torch.arange(1.0, 5.0)
        return OpCall(
            title="four numbers",
            bound=bound,
            kernel=tuple(lambda x=x: self.kernel(x) for x in xs),
            body=tuple(lambda x=x: 2 * x for x in xs),
        )


def swept(tuner: Acme, calls: int = 1, *, timed: bool = True) -> Search:
    (found,) = sweep(iter([tuner.call()] * calls), tuner, Device(tuner), repeats=3, timed=timed)
    return found


def test_the_fastest_right_one_is_the_best() -> None:
    slow, fast = {"does": RIGHT, "ms": 8}, {"does": RIGHT, "ms": 5}
    found = swept(Acme(slow, fast, {"does": RIGHT, "ms": 7}))
    assert found.best is not None
    assert found.best.config == fast
    assert found.best.ratio == pytest.approx(0.5)


@pytest.mark.parametrize(("does", "reason"), [(WRONG, "wrong result"), (RAISES, "MemoryError"), (IDLE, "wrong result")])
def test_what_is_wrong_or_fails_is_dropped_and_counted(does: int, reason: str) -> None:
    found = swept(Acme({"does": does, "ms": 1}, {"does": RIGHT, "ms": 9}))
    assert dict(found.dropped) == {reason: 1}
    assert found.best is not None
    assert found.best.config["ms"] == 9


def test_a_hair_is_no_reason_to_change() -> None:
    assert swept(Acme({"does": RIGHT, "ms": 9.9})).best is None


def test_calls_that_share_a_choice_decide_together() -> None:
    """Twice as fast on one call and thrice as slow on another is no gain."""
    tuner = Acme({"does": RIGHT, "ms": 5})
    runtime = Device(tuner)
    calls = iter([tuner.call(), tuner.call()])

    def second() -> Iterator[OpCall]:
        yield next(calls)
        tuner.candidates[0]["ms"] = 30
        yield next(calls)

    (found,) = sweep(second(), tuner, runtime, repeats=3)
    assert found.trials[0].seconds == [(0.005, 0.01), (0.03, 0.01)]
    assert found.best is None


def test_a_config_in_force_that_is_wrong_ends_it() -> None:
    with pytest.raises(DeviceError, match="is wrong itself"):
        swept(Acme({"does": RIGHT, "ms": 1}, in_force={"does": WRONG, "ms": 10}))
    with pytest.raises(DeviceError, match="does not run: MemoryError"):
        swept(Acme({"does": RIGHT, "ms": 1}, in_force={"does": RAISES, "ms": 10}))


def test_a_dry_run_only_lists() -> None:
    found = swept(Acme({"does": RAISES, "ms": 1}, unfit=3), timed=False)
    assert [trial.config["does"] for trial in found.trials] == [RAISES]
    assert (found.unfit, found.base, found.best, dict(found.dropped)) == (3, [], None, {})


@pytest.mark.parametrize("safe", [True, False])
def test_only_graph_safe_kernels_are_replayed(safe: bool) -> None:
    tuner = Acme({"does": RIGHT, "ms": 1})
    runtime = Device(tuner)
    call = tuner.call(features=frozenset({"graph_safe"} if safe else ()))
    sweep(iter([call]), tuner, runtime, repeats=3)
    assert runtime.replayed == [safe, safe]


def test_a_runtime_times_each_call() -> None:
    ran = []
    seconds = TorchRuntime(RuntimeContext(devices=())).time_calls(lambda: ran.append(0), repeats=4)
    assert len(seconds) == len(ran) == 4
    assert min(seconds) >= 0
