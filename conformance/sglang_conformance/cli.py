"""`sglang-conformance run DEVICE`: the suite on one device, as a table, a JSON file and an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sglang_conformance import __version__
from sglang_conformance.runner import Result, Suite, Verdict
from sglang_core.backend.devices import open_device
from sglang_core.backend.version import API_VERSION
from sglang_core.errors import SglangError

STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.NOT_CLAIMED: "cyan", Verdict.REFUSED: "yellow"}


def main(argv: list[str] | None = None) -> int:
    """0: nothing failed. 1: something did. 2: the device cannot be opened, or no case was selected."""
    args = _parser().parse_args(argv)
    console = Console()
    try:
        chosen = open_device(args.device)
        suite = Suite(chosen.backend, chosen.info, seed=args.seed, num_threads=args.num_threads)
    except SglangError as e:
        print(f"sglang-conformance: {e}", file=sys.stderr)
        return 2
    results = []
    for result in suite.run(args.k):
        results.append(result)
        if args.verbose or result.verdict is Verdict.FAIL:
            console.print(_line(result), highlight=False, soft_wrap=True)
    suite.close()
    if not results:
        print(f"sglang-conformance: no case's title contains {' or '.join(map(repr, args.k))}", file=sys.stderr)
        return 2
    console.print(_table(results, chosen.info.label))
    if untested := suite.untested_claims():
        console.print(f"claimed and not tested by any case: {', '.join(untested)}")
    counts = Counter(result.verdict for result in results)
    console.print(", ".join(f"{counts[v]} {v.value}" for v in Verdict if counts[v]))
    if args.json:
        args.json.write_text(json.dumps(_report(results, suite), indent=1) + "\n")
    return 1 if counts[Verdict.FAIL] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-conformance", description="The conformance suite of sglang-core backends."
    )
    parser.add_argument("--version", action="version", version=__version__)
    run = parser.add_subparsers(required=True, metavar="COMMAND").add_parser("run", help="run the suite on a device")
    run.add_argument("device", metavar="DEVICE", help="backend name, or name:index")
    run.add_argument(
        "-k", action="append", default=[], metavar="TEXT", help="only cases whose title contains TEXT; repeatable"
    )
    run.add_argument("--seed", type=int, default=0, help="seed of every case's numbers (default 0)")
    run.add_argument("--num-threads", type=int, metavar="N", help="threads of a device that is the host itself")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    run.add_argument("-v", "--verbose", action="store_true", help="a line for every case")
    return parser


def _line(r: Result) -> str:
    style = STYLES.get(r.verdict, "dim")
    errors = ", ".join(f"{name} {e.max:.1e}" for name, e in r.errors.items())
    detail = " ".join(part for part in (r.provider, errors, r.reason) if part).replace("[", "\\[")
    return f"[{style}]{r.verdict.value:<11}[/] {r.title.replace('[', chr(92) + '[')}  {detail}"


def _table(results: list[Result], device: str) -> Table:
    """One row an op, one column a verdict that occurs."""
    seen = [v for v in Verdict if any(r.verdict is v for r in results)]
    table = Table(title=f"conformance of {device}")
    table.add_column("op")
    for verdict in seen:
        table.add_column(verdict.value, justify="right", style=STYLES.get(verdict, "dim"))
    table.add_column("provider")
    for op in dict.fromkeys(r.op for r in results):
        mine = [r for r in results if r.op == op]
        counts = Counter(r.verdict for r in mine)
        providers = ", ".join(sorted({r.provider for r in mine if r.provider}))
        table.add_row(op, *(str(counts[v] or "") for v in seen), providers)
    return table


def _report(results: list[Result], suite: Suite) -> dict[str, object]:
    return {
        "device": dataclasses.asdict(suite.info) | {"facts": dict(suite.info.facts)},
        "seed": suite.seed,
        "profiles": list(suite.claims.profiles),
        "versions": {
            "sglang-conformance": __version__,
            "sglang-core": str(API_VERSION),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "counts": {v.value: sum(r.verdict is v for r in results) for v in Verdict},
        "untested_claims": suite.untested_claims(),
        "results": [dataclasses.asdict(r) | {"verdict": r.verdict.value} for r in results],
    }


if __name__ == "__main__":
    sys.exit(main())
