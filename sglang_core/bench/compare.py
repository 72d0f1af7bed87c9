"""`compare`: every provider of an op on the model's own shapes, beside the one in force: right first, then how fast."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from sglang_core.backend.kernel import OpSite
from sglang_core.bench.calls import open_operands
from sglang_core.bench.checks import MARGIN, check, check_in_force, first_line, mean_ratio, seconds
from sglang_core.bench.comparison import Comparison, Contender
from sglang_core.bench.op_calls import OpCall, Operands, Step
from sglang_core.errors import DeviceError

TURNS = 3  # in which the repeats of two providers alternate, so that a device that grows warm is no provider's fault
HOPELESS = 3.0  # after one turn, as many times as long as the one in force: timed no further


@dataclass(kw_only=True)
class Score:
    """Of one provider: its seconds and those of the one in force beside it, for each call by number. `dropped`: why and where it is out."""

    provider: str
    pairs: dict[int, tuple[float, float]] = field(default_factory=dict)
    dropped: str = ""

    @property
    def ratio(self) -> float:
        """Of its time to that of the one in force: the geometric mean over calls."""
        return mean_ratio(list(self.pairs.values()))


@dataclass(kw_only=True)
class Outcome:
    """Of all: the calls, and the seconds that each took the one in force."""

    titles: list[str] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    scores: list[Score]

    @property
    def best(self) -> Score | None:
        """What is right on every call, and better than the one in force by more than two measurements of one kernel differ."""
        alive = [score for score in self.scores if score.pairs and not score.dropped]
        best = min(alive, key=lambda score: score.ratio, default=None)
        return best if best is not None and best.ratio < 1 - MARGIN else None


def compare(
    comparison: Comparison,
    token_counts: Sequence[int],
    *,
    repeats: int,
    progress: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> Outcome:
    """Open the device, check and time every provider on every call. No more than two have operands at a time.

    Raises DeviceError where the one in force is wrong or does not run, or a provider left a device on which it no longer does.
    """
    make = open_operands(comparison.resolved, comparison.in_force.table, comparison.context)
    outcome = Outcome(scores=[Score(provider=other.name) for other in comparison.others])
    try:
        with torch.inference_mode():
            for site, step in comparison.steps(token_counts):
                _Round(comparison, make, site, step, repeats).add_to(outcome, progress)
    finally:
        make.runtime.close()
    return outcome


class _Round:
    """One call: of the one in force, and of every other provider beside it."""

    def __init__(self, comparison: Comparison, make: Operands, site: OpSite, step: Step, repeats: int) -> None:
        self.comparison, self.make, self.site, self.step, self.repeats = comparison, make, site, step, repeats
        self.in_force, self.runtime = comparison.in_force, make.runtime
        self.base = self.in_force.call(make, site, step)
        self.title = self.base.title if site.op == comparison.op else f"{site.op}: {self.base.title}"
        self._expected: dict[object, tuple[object, ...]] = {}

    def add_to(self, outcome: Outcome, progress: Callable[[str, int, int], None]) -> None:
        names = ", ".join(other.name for other in self.comparison.others) or "none"
        way_out = f"put another in force with --kernel {self.comparison.op}=PROVIDER (there are {names}), or take fewer --tokens"
        check_in_force(
            self.base, self.expected(self.in_force, self.base), what=f"provider ({self.in_force.name})", way_out=way_out
        )
        beside: list[float] = []
        for done, (other, score) in enumerate(zip(self.comparison.others, outcome.scores, strict=True)):
            progress(self.title, done, len(outcome.scores))
            if (
                not score.dropped
                and self.comparison.differs(other, self.site)
                and (pair := self.pair(other, score)) is not None
            ):
                score.pairs[len(outcome.titles)] = pair
                beside.append(pair[1])
        if not beside:
            replayed = self.in_force.graph_safe(self.site)
            beside.append(seconds(self.base.kernel[0], self.runtime, self.repeats, replayed=replayed))
        outcome.titles.append(self.title)
        outcome.base.append(statistics.median(beside))

    def pair(self, other: Contender, score: Score) -> tuple[float, float] | None:
        """Medians of it and of the one in force; None where it is out, and `score` says why."""
        try:
            call = other.call(self.make, self.site, self.step)
            wrong = check(call, self.expected(other, call))
            if not wrong:
                return self.in_turns(call, replayed=other.graph_safe(self.site) and self.in_force.graph_safe(self.site))
        except Exception as error:  # a compiler's, or a device's: this provider is out, whatever it is
            wrong = f"raised {type(error).__name__}: {first_line(error)}"
            self.check_alive(other.name)
        score.dropped = f"{wrong} ({self.title})"
        return None

    def in_turns(self, call: OpCall, *, replayed: bool) -> tuple[float, float]:
        """`replayed` is both or none, so that launches count for both."""
        own: list[float] = []
        beside: list[float] = []
        for turn in _turns(self.repeats):
            beside += self.runtime.time_calls(self.base.kernel[0], repeats=turn, replayed=replayed)
            own += self.runtime.time_calls(call.kernel[0], repeats=turn, replayed=replayed)
            if statistics.median(own) > HOPELESS * statistics.median(beside):
                break
        return statistics.median(own), statistics.median(beside)

    def expected(self, contender: Contender, call: OpCall) -> tuple[object, ...]:
        """Of the body. Where weights load dense, or pages have another size, operands are others."""
        key = call.bound.dequantized, contender.table.page_size
        if key not in self._expected:
            self._expected[key] = tuple(body() for body in call.body)
        return self._expected[key]

    def check_alive(self, name: str) -> None:
        """Raises DeviceError where the one in force, which ran before, does not any more: who comes next would be blamed."""
        try:
            self.base.kernel[0]()
            self.runtime.synchronize()
        except Exception as error:
            rest = ",".join(other.name for other in self.comparison.others if other.name != name)
            way_out = f"compare without it: --providers {rest}" if rest else "nothing else is left to compare"
            raise DeviceError(f"{name} broke the device ({self.title}): {first_line(error)}; {way_out}") from error


def _turns(repeats: int) -> list[int]:
    """9 -> [3, 3, 3]; 2 -> [1, 1]."""
    return [n for i in range(TURNS) if (n := repeats // TURNS + (i < repeats % TURNS))]
