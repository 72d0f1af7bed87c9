"""`sglang-core bench step`: how long one prefill or decode step takes, over batch sizes and lengths."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from sglang_core.cli.parser import Parser, print_json
from sglang_core.cli.settings import WHICH_MODEL, add_settings, engine_config
from sglang_core.cli.table import print_table
from sglang_core.errors import ConfigError

if TYPE_CHECKING:
    from sglang_core.bench.step import StepShape, StepTime

COLUMNS = ("step", "requests>", "length>", "median ms>", "best ms>", "tokens/s>")


def run(argv: list[str]) -> int:
    parser = Parser(
        "bench step",
        "--model-path MODEL [options]",
        "Time single steps of a model, from plan to tokens on the host, without scheduler or server.",
        argv,
        epilog="example: sglang-core bench step --model-path demo --batch-size 1,8,32 --length 128,512",
    )
    own = parser.add_argument_group("steps")
    own.add_argument("--batch-size", default="1,8", metavar="N,...", help="requests in a step (default: 1,8)")
    own.add_argument("--length", default="128,1024", metavar="N,...", help="tokens of each request (default: 128,1024)")
    own.add_argument(
        "--mode", choices=("both", "prefill", "decode"), default="both", help="kinds of step (default: both)"
    )
    own.add_argument(
        "--repeats",
        type=int,
        default=10,
        metavar="N",
        help="steps of a shape, of which the median counts (default: 10)",
    )
    own.add_argument("--json", action="store_true", help="print JSON")
    add_settings(parser, shown=WHICH_MODEL)
    args = parser.parse()
    if args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats} must be at least 1")
    config = engine_config(args, log_level="error")
    sizes = list(itertools.product(numbers("--batch-size", args.batch_size), numbers("--length", args.length)))
    from sglang_core.bench.step import StepDriver, StepShape, open_rank  # imports torch

    shapes = [StepShape.prefill(*size) for size in sizes if args.mode != "decode"]
    shapes += [StepShape.decode(*size) for size in sizes if args.mode != "prefill"]
    rank = open_rank(config, shapes)
    try:
        driver = StepDriver.of(rank)
        times = [driver.measure(shape, args.repeats) for shape in shapes]
    finally:
        rank.runner.close()
    if args.json:
        print_json([_facts(t) for t in times])
    else:
        device = rank.resolved.device.info
        title = f"{config.model.model_path} in {rank.resolved.config.model.dtype} on {device.label} ({device.path})"
        print_table(COLUMNS, [_cells(t) for t in times], title)
    return 0


def numbers(flag: str, text: str) -> list[int]:
    """ "1,8" -> [1, 8]. Raises ConfigError."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise ConfigError(f"{flag} {text!r} must be whole numbers above 0 with commas between, like 1,8")
    return found


def _cells(t: StepTime) -> tuple[str, ...]:
    shape = t.shape
    length = str(shape.length)
    return (
        shape.mode.value,
        str(shape.num_reqs),
        length,
        f"{1e3 * t.median:.2f}",
        f"{1e3 * t.best:.2f}",
        f"{t.tokens_per_s:.1f}",
    )


def _facts(t: StepTime) -> dict[str, object]:
    shape: StepShape = t.shape
    return {
        "mode": shape.mode.value,
        "num_reqs": shape.num_reqs,
        "length": shape.length,
        "median_s": t.median,
        "best_s": t.best,
        "tokens_per_s": t.tokens_per_s,
        "repeats": t.repeats,
    }
