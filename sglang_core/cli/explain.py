"""`sglang-core explain`: for each op of a model on a device, the kernel chosen, and why each other candidate was refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from sglang_core.cli.parser import Parser, print_json
from sglang_core.cli.settings import WHICH_MODEL, add_settings, engine_config
from sglang_core.cli.table import print_table

if TYPE_CHECKING:
    from sglang_core.backend.selection import ExplainRow

COLUMNS = ("op", "layer", "dtype", "format", "sites>", "runs", "why", "refused")
MARKED = ("reference", "decomposed")


def run(argv: list[str]) -> int:
    parser = Parser(
        "explain",
        "--model-path MODEL [--device NAME] [options]",
        "Show what each op of a model runs on a device, and why. REFERENCE is the op's own body: the backend claims nothing"
        "\nbetter. FALLBACK is a body that runs where the backend claims a kernel and the kernel refuses.",
        argv,
        epilog="example: sglang-core explain --model-path demo --device cpu",
    )
    parser.options.add_argument("--op", metavar="NAME", help="only ops whose name contains this")
    parser.options.add_argument("--json", action="store_true", help="print JSON")
    add_settings(parser, shown=(*WHICH_MODEL, "kernel", "fallback", "deterministic"))
    args = parser.parse()
    config = engine_config(args, log_level="error")
    from sglang_core.engine.explain import explain  # imports torch

    rows = [row for row in explain(config) if not args.op or args.op in row.op]
    if args.json:
        print_json([asdict(row) for row in rows])
        return 0
    title = f"{config.model.model_path} on {config.device.device}"
    print_table(COLUMNS, table_rows(rows), title)
    print(totals(rows))
    return 0


def table_rows(rows: list[ExplainRow]) -> list[tuple[object, ...]]:
    """Rows by op; sites that differ only in their sizes are one row with their number."""
    sites = Counter(rows)
    ordered = sorted(sites, key=lambda row: row.op)
    return [_cells(row, sites[row]) for row in ordered]


def _cells(row: ExplainRow, num_sites: int) -> tuple[object, ...]:
    refused = "\n".join(f"{kernel}: {reason}" for kernel, reason in row.refused)
    fmt = "" if row.fmt == "*" else row.fmt
    return row.op, row.layer, row.dtype, fmt, num_sites, runs(row), row.why, refused


def runs(row: ExplainRow) -> str:
    """Who runs the op, as the table says it."""
    if row.fallback:
        return "FALLBACK"
    return row.provider.upper() if row.provider in MARKED else row.provider


def totals(rows: list[ExplainRow]) -> str:
    names = [runs(row) for row in rows]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return f"{len(rows)} op sites: " + ", ".join(f"{count} {name}" for name, count in counts.items())
