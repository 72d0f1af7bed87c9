"""`tune`: of each choice that an op's kernel makes, every candidate on the model's own shapes: right first, then how fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sglang_core.backend.binding import import_target
from sglang_core.backend.discovery import did_you_mean
from sglang_core.backend.interface import DeviceRuntime
from sglang_core.backend.selection import DECOMPOSED, REFERENCE, BoundOp, OpTable
from sglang_core.backend.tuning import Config, Knob, TuneContext, Tuner
from sglang_core.bench.calls import TUNED, calls_of, open_operands
from sglang_core.bench.checks import MARGIN, check, check_in_force, graph_safe, mean_ratio, seconds
from sglang_core.bench.op_calls import OpCall, Operands, grouped_of_fused
from sglang_core.config import EngineConfig
from sglang_core.engine.explain import bound_model
from sglang_core.engine.resolve import Resolved, resolve
from sglang_core.errors import ConfigError
from sglang_core.ops import OPS

WAY_OUT = "if a candidate before it broke the device, run again with fewer --tokens, or on this one alone"


@dataclass(kw_only=True)
class Trial:
    """What is known of one candidate of a knob: its seconds and those of the config in force, a pair for each call."""

    config: Config
    seconds: list[tuple[float, float]] = field(default_factory=list)
    dropped: str = ""

    @property
    def ratio(self) -> float:
        """Of its time to that of the config in force: the geometric mean over calls."""
        return mean_ratio(self.seconds)


@dataclass(kw_only=True)
class Search:
    """One knob. `trials` has all candidates, the one in force not among them."""

    knob: Knob
    in_force: Config
    trials: list[Trial]
    unfit: int
    base: list[float] = field(default_factory=list)  # seconds of the config in force, a call each

    @property
    def best(self) -> Trial | None:
        """What is better than the config in force, if anything."""
        alive = [trial for trial in self.trials if trial.seconds and not trial.dropped]
        best = min(alive, key=lambda trial: trial.ratio, default=None)
        return best if best is not None and best.ratio < 1 - MARGIN else None

    @property
    def dropped(self) -> Counter[str]:
        """How many candidates are out, by reason."""
        return Counter(trial.dropped for trial in self.trials if trial.dropped)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """An op of a model on an opened device, and what tunes its kernel."""

    resolved: Resolved
    table: OpTable
    sites: Sequence[BoundOp]
    tuner: Tuner
    operands: Operands

    @property
    def runtime(self) -> DeviceRuntime:
        return self.operands.runtime

    def calls(self, token_counts: Sequence[int]) -> Iterator[OpCall]:
        """Of every site and number of tokens. Operands of one are gone when the next is asked for."""
        for bound in self.sites:
            for tokens in token_counts:
                yield from calls_of(self.operands, bound, tokens)


def open_tuning(config: EngineConfig, op: str, *, context: int, out: str | None) -> Tuning:
    """Bind the model as the engine would, and open the device.

    Raises ConfigError where the op is none, is not in the model, or runs nothing that can be tuned.
    """
    if op not in TUNED:
        known = "is not tuned" if op in OPS else f"is no op{did_you_mean(op, TUNED)}"
        raise ConfigError(f"--op {op} {known}; tuned are {', '.join(TUNED)}")
    resolved = resolve(config)
    table, _ = bound_model(resolved)
    sites = _sites(table, op, config.model.model_path)
    info = resolved.device.info
    kernel = sites[0].kernels[0]
    tunes = {bound.kernels[0].tune: bound.provider for bound in sites}
    if len(tunes) > 1:
        raise ConfigError(f"{op} is run by {' and '.join(tunes.values())} here; choose one with --kernel {op}=PROVIDER")
    (target,) = tunes
    assert target is not None
    tuner = import_target(kernel, target)(TuneContext(device=info, op=op, out=_path(out)))
    assert isinstance(tuner, Tuner), f"{target} made {tuner!r}, which is no Tuner"
    operands = open_operands(resolved, table, context)
    return Tuning(resolved=resolved, table=table, sites=sites, tuner=tuner, operands=operands)


def _path(out: str | None) -> Path | None:
    return None if out is None else Path(out).expanduser()


def _sites(table: OpTable, op: str, model: str) -> list[BoundOp]:
    found = [bound for bound in table.bound_ops if bound.site.op == op]
    if op == "gemm.grouped" and not found:
        experts = [bound for bound in table.bound_ops if bound.site.op == "moe.fused"]
        found = [part for bound in experts for part in grouped_of_fused(table, bound)]
    if not found:
        there = sorted({b.site.op for b in table.bound_ops} & set(TUNED))
        raise ConfigError(f"{model} has no {op}; of what can be tuned it has {', '.join(there) or 'nothing'}")
    tuned = [bound for bound in found if bound.kernels and bound.kernels[0].tune]
    if tuned:
        return tuned
    bound = found[0]
    if bound.provider in (REFERENCE, DECOMPOSED):
        why = f"runs its {bound.provider.upper()} body"
    else:
        why = f"runs {bound.kernels[0].fn} of {bound.provider!r}, which has nothing to tune"
    raise ConfigError(
        f"{op} of {model} {why} on {table.device.label} ({bound.reason}); `sglang-core explain` says what else there is, and"
        f" --kernel {op}=PROVIDER chooses it"
    )


def sweep(
    calls: Iterator[OpCall],
    tuner: Tuner,
    runtime: DeviceRuntime,
    *,
    repeats: int,
    timed: bool = True,
    progress: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> list[Search]:
    """Try every candidate on every call. `timed`: else only say which there are. `progress` is told (what, candidates done, of how many).

    Raises DeviceError where the config in force is itself wrong or does not run: then there is nothing to compare with.
    """
    found: dict[Knob, Search] = {}
    with torch.inference_mode():
        for call in calls:
            expected = tuple(body() for body in call.body) if timed else ()
            if timed:
                check_in_force(call, expected, what="config", way_out=WAY_OUT)
            choices = tuner.choices(call.kernel[0])
            total = sum(len(choice.candidates) for choice in choices)
            done = 0
            for choice in choices:
                fresh = Search(knob=choice.knob, in_force=choice.in_force, trials=[], unfit=choice.unfit)
                fresh.trials += [Trial(config=config) for config in choice.candidates]
                search = found.setdefault(choice.knob, fresh)
                if timed:
                    search.base.append(
                        seconds(call.kernel[0], runtime, repeats, replayed=graph_safe(call.bound.kernels))
                    )
                for trial in search.trials:
                    if timed and not trial.dropped:
                        _try(trial, search, call, expected, tuner, runtime, repeats)
                    done += 1
                    progress(call.title, done, total)
    return list(found.values())


def _try(
    trial: Trial,
    search: Search,
    call: OpCall,
    expected: Sequence[object],
    tuner: Tuner,
    runtime: DeviceRuntime,
    repeats: int,
) -> None:
    try:
        with tuner.using(search.knob, trial.config):
            trial.dropped = check(call, expected)
            if trial.dropped:
                return
            took = seconds(call.kernel[0], runtime, repeats, replayed=graph_safe(call.bound.kernels))
    except Exception as error:  # a compiler's, or a device's: this candidate is out, whatever it is
        trial.dropped = type(error).__name__
        return
    trial.seconds.append((took, search.base[-1]))
