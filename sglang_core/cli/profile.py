"""`sglang-core profile`: where a model's time goes on a device, op by op: the order in which to write kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sglang_core.cli.parser import Parser, print_json
from sglang_core.cli.settings import WHICH_MODEL, add_settings, engine_config
from sglang_core.cli.table import print_table
from sglang_core.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    from sglang_core.bench.op_clock import OpClock, OpTime
    from sglang_core.bench.step import StepDriver, StepShape

COLUMNS = ("op", "layer", "runs", "calls/step>", "ms/step>", "share>", "of all>")
REFERENCE = "reference"
MARKED = (REFERENCE, "decomposed")


def run(argv: list[str]) -> int:
    parser = Parser(
        "profile",
        "--model-path MODEL [options]",
        "Rank the ops of a model by the time they take on a device. Ops that run their REFERENCE body are marked,"
        "\nand ranked once more at the end, by their share of a step: write these next.",
        argv,
        epilog="example: sglang-core profile --model-path demo --device cpu",
    )
    own = parser.add_argument_group("steps")
    own.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests in the decode step (default: 8)")
    own.add_argument("--length", type=int, default=512, metavar="N", help="tokens of each request (default: 512)")
    own.add_argument("--repeats", type=int, default=10, metavar="N", help="steps measured (default: 10)")
    own.add_argument("--json", action="store_true", help="print JSON")
    add_settings(parser, shown=WHICH_MODEL)
    args = parser.parse()
    for name in ("batch_size", "length", "repeats"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    config = engine_config(args, log_level="error")
    from sglang_core.bench.op_clock import OpClock
    from sglang_core.bench.step import StepDriver, StepShape, open_rank  # imports torch

    shapes = {"prefill": StepShape.prefill(1, args.length), "decode": StepShape.decode(args.batch_size, args.length)}
    clock = OpClock()
    rank = open_rank(config, list(shapes.values()), clock.instrument)
    try:
        clock.synchronize = rank.runtime.synchronize
        driver = StepDriver.of(rank)
        found = {name: _measure(driver, clock, shape, args.repeats) for name, shape in shapes.items()}
    finally:
        rank.runner.close()
    if not any(ops for _, ops in found.values()):
        label = rank.resolved.device.info.label
        raise DeviceError(
            f"{label} runs compiled steps, in which single ops cannot be timed; profile with its vendor's tool"
        )
    following = write_next(found)
    if args.json:
        steps = {name: {"seconds": seconds, "ops": [asdict(o) for o in ops]} for name, (seconds, ops) in found.items()}
        print_json(steps | {"write_next": [{"op": op, "shares": shares} for op, shares in following]})
        return 0
    device = rank.resolved.device.info
    for name, (seconds, ops) in found.items():
        shape = shapes[name]
        title = f"{name}, {shape.num_reqs} requests of {args.length} tokens, {1e3 * seconds:.2f} ms a step on {device.label} ({device.path})"
        print_table(COLUMNS, table_rows(seconds, ops), title)
    ranked = [(op, *(f"{share:.1%}" for share in shares.values())) for op, shares in following]
    if ranked:
        print_table(("op", *(f"{name}>" for name in found)), ranked, "write these next: ops on their reference bodies")
    else:
        print("every op of this model runs a kernel")
    return 0


def write_next(found: Mapping[str, tuple[float, list[OpTime]]]) -> list[tuple[str, dict[str, float]]]:
    """Ops that run their reference body: share of each step's time. The one with the largest share of any step is first."""
    shares: dict[str, dict[str, float]] = {}
    for name, (seconds, ops) in found.items():
        for op in ops:
            if op.provider == REFERENCE:
                mine = shares.setdefault(op.op, dict.fromkeys(found, 0.0))
                mine[name] += op.seconds / seconds
    return sorted(shares.items(), key=lambda item: -max(item[1].values()))


def _measure(driver: StepDriver, clock: OpClock, shape: StepShape, repeats: int) -> tuple[float, list[OpTime]]:
    """Seconds a step, and each op's part of one step."""
    driver.run(shape)
    clock.reset()
    seconds = sum(driver.run(shape) for _ in range(repeats)) / repeats
    ops = clock.ranked()
    for op in ops:
        op.calls, op.seconds = op.calls // repeats, op.seconds / repeats
    return seconds, ops


def table_rows(seconds: float, ops: list[OpTime]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    seen = 0.0
    for op in ops:
        seen += op.seconds
        runs = op.provider.upper() if op.provider in MARKED else op.provider
        rows.append((op.op, op.layer, runs, op.calls, *_time(op.seconds, seconds), f"{seen / seconds:.0%}"))
    rest = max(0.0, seconds - seen)
    return [*rows, ("(outside ops)", "", "", "", *_time(rest, seconds), "100%")]


def _time(part: float, whole: float) -> tuple[str, str]:
    return f"{1e3 * part:.3f}", f"{part / whole:.1%}"
