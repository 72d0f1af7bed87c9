"""`sglang-core tune`: find the configs with which a kernel is fastest on this device, for the shapes of a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sglang_core.cli import tune_providers
from sglang_core.cli.bench_step import numbers
from sglang_core.cli.parser import Parser, print_json
from sglang_core.cli.settings import WHICH_MODEL, add_settings, engine_config
from sglang_core.cli.table import print_table
from sglang_core.errors import ConfigError

if TYPE_CHECKING:
    from sglang_core.bench.tune import Search, Tuning

TOKENS = "1,16,64,256,1024,4096"
COLUMNS = ("choice", "before", "after", "us before>", "us after>", "faster>", "tried>", "dropped")


def run(argv: list[str]) -> int:
    parser = Parser(
        "tune",
        "--op OP --model-path MODEL [--device NAME] [options]",
        "Try every config of an op's kernel on the shapes of a model, and keep the fastest that is right; or, with --providers, compare who"
        "\ncan run the op, and say what to serve with. Takes minutes, and the device for itself. Weights are random: none is read. Serving"
        "\nnever tunes; it reads what this wrote.",
        argv,
        epilog="examples: sglang-core tune --device cuda --op moe.fused --model-path Qwen/Qwen3-30B-A3B"
        "\n          sglang-core tune --device cuda --op attn.paged --providers --model-path Qwen/Qwen3-8B",
    )
    own = parser.add_argument_group("tuning")
    own.add_argument("--op", required=True, metavar="NAME", help="the op, as explain names it")
    own.add_argument(
        "--providers", nargs="?", const="", metavar="NAME,...",
        help="compare providers of the op (all, or these) with the one in force; writes nothing",
    )  # fmt: skip
    own.add_argument("--tokens", default=TOKENS, metavar="N,...", help=f"tokens of a step (default: {TOKENS})")
    own.add_argument(
        "--context", type=int, default=4096, metavar="N", help="tokens that a decode step attends to (default: 4096)"
    )
    own.add_argument("--repeats", type=int, default=9, metavar="N", help="of which the median counts (default: 9)")
    own.add_argument("--out", metavar="FILE", help="write here, and not where the provider reads at start")
    own.add_argument("--dry-run", action="store_true", help="list what would be tried; time and write nothing")
    own.add_argument("--json", action="store_true", help="print JSON")
    add_settings(parser, shown=(*WHICH_MODEL, "kernel", "quantization"))
    args = parser.parse()
    for name in ("context", "repeats"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)} must be at least 1")
    token_counts = sorted(set(numbers("--tokens", args.tokens)))
    config = engine_config(args, log_level="error")
    if args.providers is not None:
        return tune_providers.run(args, config, token_counts, bar)
    from sglang_core.bench.tune import open_tuning, sweep  # imports torch

    tuning = open_tuning(config, args.op, context=args.context, out=args.out)
    try:
        if not args.json:
            print(f"configs in force: {tuning.tuner.source}")
        with bar() as progress:
            found = sweep(
                tuning.calls(token_counts),
                tuning.tuner,
                tuning.runtime,
                repeats=args.repeats,
                timed=not args.dry_run,
                progress=progress,
            )
        if not found:
            raise ConfigError(f"{args.op} chooses nothing by its sizes here: there is nothing to tune")
        path = "" if args.dry_run else str(_write(tuning, found))
    finally:
        tuning.runtime.close()
    if args.json:
        print_json({"configs": path, "choices": [_facts(search) for search in found]})
    elif args.dry_run:
        rows = [(s.knob.title, words(s.in_force), words(trial.config)) for s in found for trial in s.trials]
        print_table(("choice", "in force", "candidate"), rows, f"{len(rows)} candidates")
    else:
        info = tuning.resolved.device.info
        title = f"{args.op} of {config.model.model_path} on {info.label} ({info.name}), medians of {args.repeats}"
        print_table(COLUMNS, [_cells(search) for search in found], title)
        print(f"written to {path}")
    return 0


def _write(tuning: Tuning, found: list[Search]) -> object:
    """All that was tried, changed or not: a size in between falls to its neighbour's config, and must not skip one."""
    info = tuning.resolved.device.info
    best = {s.knob: s.in_force if s.best is None else s.best.config for s in found}
    about = {"device": info.name, "date": time.strftime("%Y-%m-%d"), **versions(), **info.versions}
    return tuning.tuner.write(best, about)


def versions() -> dict[str, str]:
    import torch

    return {"torch": torch.__version__}


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """On a terminal, how far the candidates of a call are."""
    if not sys.stderr.isatty():
        yield lambda title, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("")
        yield lambda title, done, total: progress.update(task, description=title, completed=done, total=total)


def words(config: object) -> str:
    """{"N": 64, "num_warps": 4} -> "N=64 num_warps=4"."""
    return " ".join(f"{name}={value}" for name, value in dict(config).items())  # type: ignore[call-overload]


def _cells(search: Search) -> tuple[str, ...]:
    best, before = search.best, sum(search.base)
    after = before if best is None else sum(own for own, _ in best.seconds)
    dropped = ", ".join(f"{count} {reason}" for reason, count in search.dropped.most_common())
    return (
        search.knob.title,
        words(search.in_force),
        "(stays)" if best is None else words(best.config),
        f"{1e6 * before:.1f}",
        f"{1e6 * after:.1f}",
        "" if best is None else f"{1 / best.ratio:.2f}x",
        str(len(search.trials)),
        ", ".join(filter(None, [dropped, f"{search.unfit} do not fit" if search.unfit else ""])),
    )


def _facts(search: Search) -> dict[str, object]:
    best = search.best
    return {
        "name": search.knob.name,
        "sizes": dict(search.knob.sizes),
        "before": dict(search.in_force),
        "after": None if best is None else dict(best.config),
        "seconds_before": sum(search.base),
        "seconds_after": None if best is None else sum(own for own, _ in best.seconds),
        "candidates": [dict(trial.config) for trial in search.trials],
        "dropped": dict(search.dropped),
        "unfit": search.unfit,
    }
