"""`sglang-core bench serve`: flags in, table, JSON and picture out; the measuring is in `sglang_core.bench`."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sglang_core.cli.parser import Parser, print_json
from sglang_core.cli.table import print_table
from sglang_core.cli.workload_flags import add_workload, build_prompts
from sglang_core.errors import ConfigError

if TYPE_CHECKING:
    from sglang_core.bench.serve import LoadOptions, ServeResult, Target


def run(argv: list[str]) -> int:
    parser = Parser(
        "bench serve",
        "[--url URL] [options]",
        "Measure any OpenAI-compatible server under a load. Answers run to their full length (ignore_eos).",
        argv,
        epilog="example: sglang-core bench serve --dataset shared-prefix --num-prompts 32 --output-len 16 --plot run.png",
    )
    _add_target(parser)
    _add_load(parser)
    add_workload(parser)
    _add_output(parser)
    args = parser.parse()
    result = asyncio.run(_measure(args, *_options(args)))
    _show(args, result)
    return 0 if result.summary.completed and not result.summary.failed else 1


def _add_target(parser: Parser) -> None:
    group = parser.add_argument_group("target")
    group.add_argument("--url", default="http://127.0.0.1:30000", help="server (default: http://127.0.0.1:30000)")
    group.add_argument(
        "--route",
        choices=("completions", "chat", "generate"),
        default="completions",
        help="API to use (default: completions)",
    )
    group.add_argument("--model", metavar="NAME", help="model name in requests (default: the server's first)")
    group.add_argument("--api-key", metavar="KEY", help="bearer token")
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds without a byte (default: 600)"
    )


def _add_load(parser: Parser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        metavar="X",
        help="Poisson arrivals a second; inf sends all at once (default: inf)",
    )
    group.add_argument("--max-concurrency", type=int, metavar="N", help="requests under way at most")
    group.add_argument(
        "--num-warmup", type=int, default=1, metavar="N", help="requests before the clock starts (default: 1)"
    )
    group.add_argument("--flush-cache", action="store_true", help="empty the server's prefix cache after the warm-up")
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="sampling temperature (default: 0)")
    group.add_argument("--extra-body", metavar="JSON", default="{}", help="fields to add to every request")


def _add_output(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON instead of tables")
    group.add_argument("--output", metavar="FILE", help="write JSON with every request's times")
    group.add_argument("--plot", metavar="FILE", help="write a PNG of the distributions")


def _options(args: argparse.Namespace) -> tuple[Target, LoadOptions]:
    from sglang_core.bench.serve import LoadOptions, Target

    if args.request_rate <= 0:
        raise ConfigError(f"--request-rate {args.request_rate} must be above 0, or inf")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ConfigError(f"--max-concurrency {args.max_concurrency} must be at least 1")
    target = Target(
        base_url=args.url.rstrip("/").removesuffix("/v1"),
        route=args.route,
        model=args.model,
        api_key=args.api_key,
        timeout=args.timeout,
    )
    options = LoadOptions(
        request_rate=args.request_rate,
        max_concurrency=args.max_concurrency,
        num_warmup=args.num_warmup,
        temperature=args.temperature,
        extra_body=_json_object(args.extra_body),
        flush_cache=args.flush_cache,
        seed=args.seed,
    )
    return target, options


def _json_object(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-body {text!r} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--extra-body {text!r} must be a JSON object")
    return value


async def _measure(args: argparse.Namespace, target: Target, options: LoadOptions) -> ServeResult:
    from rich.console import Console
    from rich.progress import Progress

    from sglang_core.bench.serve import find_vocab_size, open_client, run_serve

    async with open_client(target) as client:
        prompts = build_prompts(args, args.vocab_size or await find_vocab_size(client))
        with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(f"{len(prompts)} requests", total=len(prompts))
            return await run_serve(client, target, prompts, options, lambda record: progress.advance(task))


def _show(args: argparse.Namespace, result: ServeResult) -> None:
    from sglang_core.bench import report

    config = result.config | {"dataset": args.dataset}
    document = report.to_json(config, result.summary, result.records)
    if args.output:
        report.write_json(args.output, document)
    if args.plot:
        report.plot(args.plot, f"{config['model']}, {args.dataset}, {len(result.records)} requests", result.records)
    if args.json:
        print_json({k: v for k, v in document.items() if k != "requests"})
        return
    title = f"{config['model']} at {config['base_url']}, route {config['route']}, {args.dataset}, seed {args.seed}"
    print_table(("what", "value>"), report.count_rows(result.summary), title)
    print_table(report.LATENCY_COLUMNS, report.latency_rows(result.summary))
    for warning in report.warnings(result.summary):
        print(f"! {warning}", file=sys.stderr)
