"""`tune`: of each choice that an op's kernel makes, every candidate on the model's own shapes: right first, then how fast."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sglang_core.backend.binding import import_target
from sglang_core.backend.discovery import did_you_mean
from sglang_core.backend.interface import DeviceRuntime, RuntimeContext
from sglang_core.backend.selection import DECOMPOSED, REFERENCE, BoundOp, OpTable
from sglang_core.backend.tuning import Config, Knob, TuneContext, Tuner
from sglang_core.bench.attention_calls import latent, paged
from sglang_core.bench.op_calls import Maker, OpCall, Operands, fused, grouped, grouped_of_fused, linear
from sglang_core.config import EngineConfig
from sglang_core.engine.explain import bound_model
from sglang_core.engine.resolve import Resolved, resolve
from sglang_core.errors import ConfigError, DeviceError
from sglang_core.ops import OPS
from sglang_core.runner.verify import LIMITS, distance

MAKERS: dict[str, Maker] = {
    "moe.fused": fused,
    "gemm.linear": linear,
    "gemm.grouped": grouped,
    "attn.paged": paged,
    "attn.mla_paged": latent,
}
MARGIN = 0.02  # a candidate that is less than so much faster is no better: that is what two measurements of one kernel differ by
WRONG = "wrong result"
SEED = 0


@dataclass(kw_only=True)
class Trial:
    """What is known of one candidate of a knob: its seconds and those of the config in force, a pair for each call."""

    config: Config
    seconds: list[tuple[float, float]] = field(default_factory=list)
    dropped: str = ""

    @property
    def ratio(self) -> float:
        """Of its time to that of the config in force: the geometric mean over calls."""
        return math.exp(statistics.fmean(math.log(own / base) for own, base in self.seconds))


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
    runtime: DeviceRuntime
    table: OpTable
    sites: Sequence[BoundOp]
    tuner: Tuner
    operands: Operands

    def calls(self, token_counts: Sequence[int]) -> Iterator[OpCall]:
        """Of every site and number of tokens. Operands of one are gone when the next is asked for."""
        for bound in self.sites:
            for tokens in token_counts:
                yield from MAKERS[bound.site.op](self.operands, bound, tokens)


def open_tuning(config: EngineConfig, op: str, *, context: int, out: str | None) -> Tuning:
    """Bind the model as the engine would, and open the device.

    Raises ConfigError where the op is none, is not in the model, or runs nothing that can be tuned.
    """
    if op not in MAKERS:
        known = "is not tuned" if op in OPS else f"is no op{did_you_mean(op, MAKERS)}"
        raise ConfigError(f"--op {op} {known}; tuned are {', '.join(MAKERS)}")
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
    runtime = resolved.device.backend.create_runtime(
        RuntimeContext(devices=(info,), num_threads=resolved.config.device.num_threads)
    )
    operands = Operands(
        runtime=runtime,
        table=table,
        context=min(context, resolved.context_length),
        generator=torch.Generator().manual_seed(SEED),
    )
    return Tuning(resolved=resolved, runtime=runtime, table=table, sites=sites, tuner=tuner, operands=operands)


def _path(out: str | None) -> Path | None:
    return None if out is None else Path(out).expanduser()


def _sites(table: OpTable, op: str, model: str) -> list[BoundOp]:
    found = [bound for bound in table.bound_ops if bound.site.op == op]
    if op == "gemm.grouped" and not found:
        experts = [bound for bound in table.bound_ops if bound.site.op == "moe.fused"]
        found = [part for bound in experts for part in grouped_of_fused(table, bound)]
    if not found:
        there = sorted({b.site.op for b in table.bound_ops} & MAKERS.keys())
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
                _check_in_force(call, expected)
            choices = tuner.choices(call.kernel[0])
            total = sum(len(choice.candidates) for choice in choices)
            done = 0
            for choice in choices:
                fresh = Search(knob=choice.knob, in_force=choice.in_force, trials=[], unfit=choice.unfit)
                fresh.trials += [Trial(config=config) for config in choice.candidates]
                search = found.setdefault(choice.knob, fresh)
                if timed:
                    search.base.append(_seconds(call, runtime, repeats))
                for trial in search.trials:
                    if timed and not trial.dropped:
                        _try(trial, search, call, expected, tuner, runtime, repeats)
                    done += 1
                    progress(call.title, done, total)
    return list(found.values())


def _check_in_force(call: OpCall, expected: Sequence[object]) -> None:
    title = f"the config in force for {call.bound.site.op} ({call.title})"
    try:
        reason = _check(call, expected)
    except Exception as error:  # the device's own
        raise DeviceError(
            f"{title} does not run: {type(error).__name__}: {error}; if a candidate before it broke the device, run again with fewer"
            " --tokens, or on this one alone"
        ) from error
    if reason:
        raise DeviceError(f"{title} is wrong itself; run the conformance suite on this device first")


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
            trial.dropped = _check(call, expected)
            if trial.dropped:
                return
            seconds = _seconds(call, runtime, repeats)
    except Exception as error:  # a compiler's, or a device's: this candidate is out, whatever it is
        trial.dropped = type(error).__name__
        return
    trial.seconds.append((seconds, search.base[-1]))


def _seconds(call: OpCall, runtime: DeviceRuntime, repeats: int) -> float:
    replayed = all("graph_safe" in kernel.features for kernel in call.bound.kernels)
    return statistics.median(runtime.time_calls(call.kernel[0], repeats=repeats, replayed=replayed))


def _check(call: OpCall, expected: Sequence[object]) -> str:
    """ "" or WRONG. The last set of activations first, so that memory still holds results of another set than the one asked for."""
    for kernel, want in reversed(list(zip(call.kernel, expected, strict=True))):
        got = kernel()
        assert isinstance(got, Tensor) and isinstance(want, Tensor)
        error, _ = distance(got, want)
        if not error <= LIMITS[got.dtype]:
            return WRONG
    return ""
