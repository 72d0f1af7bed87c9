"""`sglang-core bench offline`: a workload straight into an engine of this command's own."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from sglang_core.cli.parser import Parser, print_json
from sglang_core.cli.settings import WHICH_MODEL, add_settings, engine_config
from sglang_core.cli.table import print_table
from sglang_core.cli.workload_flags import add_workload, build_prompts
from sglang_core.errors import ConfigError

if TYPE_CHECKING:
    from sglang_core.bench.offline import OfflineRun

COLUMNS = ("run", "seconds>", "requests/s>", "output tokens/s>", "total tokens/s>", "prompt tokens>", "from cache>")


def run(argv: list[str]) -> int:
    parser = Parser(
        "bench offline",
        "--model-path MODEL [options]",
        "Measure the engine without HTTP: all prompts at once, the cache emptied before each run.",
        argv,
        epilog="example: sglang-core bench offline --model-path demo --num-prompts 32 --input-len 64 --output-len 32",
    )
    parser.options.add_argument(
        "--num-runs", type=int, default=3, metavar="N", help="runs, of which the median counts (default: 3)"
    )
    parser.options.add_argument("--json", action="store_true", help="print JSON")
    add_workload(parser)
    add_settings(parser, shown=WHICH_MODEL)
    args = parser.parse()
    if args.num_runs < 1:
        raise ConfigError(f"--num-runs {args.num_runs} must be at least 1")
    config = engine_config(args, log_level="error")
    from sglang_core import Engine  # imports torch
    from sglang_core.bench.offline import median_run, run_offline

    with Engine(**config.flat()) as engine:
        prompts = build_prompts(args, engine.info.vocab_size)
        run_offline(engine, prompts[:1])
        runs = []
        for _ in range(args.num_runs):
            engine.flush_cache()
            runs.append(run_offline(engine, prompts))
    median = median_run(runs)
    if args.json:
        print_json({"median": _facts(median), "runs": [_facts(run) for run in runs]})
        return 0
    rows = [(str(i), *_cells(run)) for i, run in enumerate(runs, 1)]
    title = (
        f"{config.model.model_path} on {config.device.device}, {args.dataset}, {len(prompts)} prompts, seed {args.seed}"
    )
    print_table(COLUMNS, [*rows, ("median", *_cells(median))], title)
    return 0


def _cells(run: OfflineRun) -> tuple[str, ...]:
    return (
        f"{run.seconds:.2f}",
        f"{run.requests_per_s:.2f}",
        f"{run.output_per_s:.1f}",
        f"{run.total_per_s:.1f}",
        str(run.prompt_tokens),
        str(run.cached_tokens),
    )


def _facts(run: OfflineRun) -> dict[str, float]:
    rates = {"requests_per_s": run.requests_per_s, "output_per_s": run.output_per_s, "total_per_s": run.total_per_s}
    return asdict(run) | rates
