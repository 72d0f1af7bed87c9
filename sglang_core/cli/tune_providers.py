"""`sglang-core tune --providers`: which provider of an op is fastest on this device, for the shapes of a model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from sglang_core.cli.parser import print_json
from sglang_core.cli.table import print_table
from sglang_core.errors import ConfigError

if TYPE_CHECKING:
    from sglang_core.bench.compare import Outcome, Score
    from sglang_core.bench.comparison import Comparison
    from sglang_core.config import EngineConfig

Bar = Callable[[], AbstractContextManager[Callable[[str, int, int], None]]]


def run(args: Namespace, config: EngineConfig, token_counts: Sequence[int], bar: Bar) -> int:
    """`args` are those of `tune`."""
    if args.out is not None:
        raise ConfigError("--out is where configs go; --providers writes none")
    names = [name for name in args.providers.split(",") if name]
    from sglang_core.bench.compare import compare  # imports torch
    from sglang_core.bench.comparison import plan_comparison

    comparison = plan_comparison(config, args.op, names, context=args.context)
    if not list(comparison.steps(token_counts)):
        raise ConfigError(f"--tokens {args.tokens}: no step of so many calls {args.op}; give other numbers")
    if args.dry_run:
        return _list(comparison, token_counts, as_json=args.json)
    with bar() as progress:
        outcome = compare(comparison, token_counts, repeats=args.repeats, progress=progress)
    if args.json:
        print_json(_facts(comparison, outcome))
        return 0
    info = comparison.resolved.device.info
    title = f"{args.op} of {config.model.model_path} on {info.label} ({info.name}), us (/ in force), medians of {args.repeats}"
    columns = ("call", f"{comparison.in_force.name} (in force)>", *(f"{s.provider}>" for s in outcome.scores))
    print_table(columns, _rows(outcome), title)
    _print_reasons(comparison, outcome.scores)
    print(verdict(comparison, outcome))
    return 0


def verdict(comparison: Comparison, outcome: Outcome) -> str:
    """What to serve with, in words and as flags."""
    best, in_force = outcome.best, comparison.in_force.name
    calls = f"{len(outcome.titles)} call{'s' if len(outcome.titles) > 1 else ''}"
    if best is None:
        if not outcome.scores:
            return f"{in_force} is in force, and no other provider runs here"
        if all(score.dropped for score in outcome.scores):
            return f"{in_force} is in force, and nothing else is right on every call"
        return f"{in_force}, which is in force, is the best: nothing is 2% faster by the geometric mean of {calls}"
    gain = f"{1 / best.ratio:.2f}x as fast as {in_force}, which is in force, by the geometric mean of {calls}"
    return f"{best.provider} is {gain}. Serve with\n    {comparison.flags(best.provider)}"


def _list(comparison: Comparison, token_counts: Sequence[int], *, as_json: bool) -> int:
    steps = list(comparison.steps(token_counts))
    calls = [f"{site.op} of {site.layer}, {step.title or f'{step.tokens} tokens'}" for site, step in steps]
    others = [other.name for other in comparison.others]
    if as_json:
        refused, in_force = dict(comparison.refused), comparison.in_force.name
        notes = list(comparison.notes)
        print_json({"in_force": in_force, "compared": others, "refused": refused, "notes": notes, "calls": calls})
        return 0
    rows = [(comparison.in_force.name, "in force"), *((name, "to be compared") for name in others)]
    print_table(("provider", ""), [*rows, *((name, f"refused: {why}") for name, why in comparison.refused.items())])
    print_table(("call",), [(call,) for call in calls])
    for note in comparison.notes:
        print(f"note: {note}")
    return 0


def _rows(outcome: Outcome) -> list[tuple[str, ...]]:
    rows = [
        (title, f"{1e6 * base:.1f}", *(_cell(score, number) for score in outcome.scores))
        for number, (title, base) in enumerate(zip(outcome.titles, outcome.base, strict=True))
    ]
    means = (f"({score.ratio:.2f})" if score.pairs and not score.dropped else "out" for score in outcome.scores)
    return [*rows, ("geometric mean of ratios", "(1.00)", *means)]


def _cell(score: Score, number: int) -> str:
    if number not in score.pairs:
        return ""
    own, base = score.pairs[number]
    return f"{1e6 * own:.1f} ({own / base:.2f})"


def _print_reasons(comparison: Comparison, scores: Sequence[Score]) -> None:
    for score in scores:
        if score.dropped:
            print(f"out: {score.provider}: {score.dropped}")
    for name, why in comparison.refused.items():
        print(f"refused: {name}: {why}")
    for note in comparison.notes:
        print(f"note: {note}")


def _facts(comparison: Comparison, outcome: Outcome) -> dict[str, object]:
    best = outcome.best
    return {
        "in_force": comparison.in_force.name,
        "calls": [
            {
                "call": title,
                "seconds": base,
                "providers": {s.provider: s.pairs[i] for s in outcome.scores if i in s.pairs},
            }
            for i, (title, base) in enumerate(zip(outcome.titles, outcome.base, strict=True))
        ],
        "ratios": {s.provider: s.ratio for s in outcome.scores if s.pairs and not s.dropped},
        "out": {s.provider: s.dropped for s in outcome.scores if s.dropped},
        "refused": dict(comparison.refused),
        "notes": list(comparison.notes),
        "best": None if best is None else best.provider,
        "flags": "" if best is None else comparison.flags(best.provider),
    }
