"""`sglang-conformance`: run the suite on a device, check and compare its reports, start a plugin."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sglang_conformance import __version__, mustpass, report, scaffold
from sglang_conformance.compare import compare
from sglang_conformance.e2e.case import level_of_case
from sglang_conformance.isolation import CASE_LIMIT, run_isolated
from sglang_conformance.matrix import markdown, overview
from sglang_conformance.page import html
from sglang_conformance.perf import apart
from sglang_conformance.perf.figures import Row, Skipped
from sglang_conformance.perf.measure import LIMIT, measure
from sglang_conformance.perf.table import table as perf_table
from sglang_conformance.result import Result, Verdict
from sglang_conformance.runner import Suite, Work
from sglang_conformance.verify import verify
from sglang_core.backend.devices import open_device
from sglang_core.errors import SglangError

STYLES = {Verdict.PASS: "green", Verdict.FAIL: "bold red", Verdict.NOT_CLAIMED: "cyan", Verdict.WAIVED: "yellow"}


def main(argv: list[str] | None = None) -> int:
    """0: nothing failed. 1: something did. 2: it cannot be done: no such device, case, or report."""
    args = make_parser().parse_args(argv)
    try:
        return int(args.do(args))
    except SglangError as e:
        print(f"sglang-conformance: {e}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    chosen = open_device(args.device)
    suite = Suite(
        chosen.backend,
        chosen.info,
        seed=args.seed,
        num_threads=args.num_threads,
        strict=args.strict,
        full=args.full or bool(args.k),
    )
    work = [(case, dtype) for case, dtype in suite.select(args.k) if args.level in (None, level_of_case(case))]
    if not work:
        texts = f"'s title contains {' or '.join(map(repr, args.k))}" if args.k else ""
        raise SglangError(f"no case of level {args.level or 'ops or e2e'}{texts}; -v without -k lists all of them")
    console = Console()
    results, start = [], time.perf_counter()
    for result in _results(suite, work, args):
        results.append(result)
        if args.verbose or result.verdict is Verdict.FAIL:
            console.print(_line(result), highlight=False, soft_wrap=True)
    order = {case.title(dtype): i for i, (case, dtype) in enumerate(work)}
    results.sort(key=lambda r: order[r.title])
    seconds = time.perf_counter() - start
    perf = apart.measured(chosen.info.label, num_threads=args.num_threads) if args.perf else None
    made = report.make(suite, results, partial=bool(args.k or args.level), seconds=seconds, perf=perf)
    _print(console, made, results, chosen.info.label)
    for path, text in ((args.json, made.text), (args.html, html(made)), (args.markdown, markdown(made))):
        if path is not None:
            path.write_text(text)
    return 0 if made.conformant else 1


def _results(suite: Suite, work: list[Work], args: argparse.Namespace) -> Iterator[Result]:
    if not args.in_process:
        yield from run_isolated(suite, work, limit=args.case_timeout, jobs=args.jobs)
        return
    for case, dtype in work:
        yield suite.judge(case, dtype)
    suite.close()


def _print(console: Console, made: report.Report, results: list[Result], device: str) -> None:
    console.print(_table(results, device))
    if untested := made.data["untested_claims"]:
        console.print(f"claimed and not tested by any case: {', '.join(untested)}")
    if unclaimed := sorted({r.op for r in results if r.works_unclaimed}):
        console.print(f"works, and nothing claims it (fails under --strict): {', '.join(unclaimed)}")
    for name, held in made.data["levels"].items():
        if held != "no" and name not in made.data["profiles"]:
            console.print(f"profile {name} holds, and is not stated")
    if made.perf is not None:
        console.print(perf_table(made.perf, device, width=console.width))
    elif made.data["perf"]:
        console.print(f"no figures: {made.data['perf']['error']}", highlight=False, soft_wrap=True)
    for problem in made.data["problems"]:
        console.print(f"[bold red]FAIL[/] {escape(problem)}", highlight=False, soft_wrap=True)
    found = ", ".join(f"{n} {verdict}" for verdict, n in made.data["counts"].items() if n)
    console.print(f"{found}; {'conformant' if made.conformant else 'not conformant'}")


def _line(r: Result) -> str:
    style = STYLES.get(r.verdict, "dim")
    errors = ", ".join(f"{name} {e.max:.1e}" for name, e in r.errors.items())
    detail = " ".join(part for part in (r.provider, errors, r.reason) if part)
    return f"[{style}]{r.verdict.value:<11}[/] {escape(r.title)}  {escape(detail)}"


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
        found = Counter(r.verdict for r in mine)
        providers = ", ".join(sorted({r.provider for r in mine if r.provider}))
        table.add_row(op, *(str(found[v] or "") for v in seen), providers)
    return table


def _perf(args: argparse.Namespace) -> int:
    """Figures are no verdict: 0 whatever they are."""
    chosen = open_device(args.device)
    suite = Suite(chosen.backend, chosen.info, seed=args.seed, num_threads=args.num_threads)
    console = Console()

    def seen(found: Row | Skipped) -> None:
        if isinstance(found, Skipped) and args.verbose:
            console.print(f"not measured: {found.op} [{found.name}]: {found.reason}", highlight=False, soft_wrap=True)

    perf = measure(suite, args.k, limit=args.limit, seen=seen)
    suite.close()
    console.print(perf_table(perf, chosen.info.label, width=console.width))
    reasons = Counter(found.reason for found in perf.skipped)
    for reason, count in reasons.items():
        console.print(f"{count} not measured: {reason}", highlight=False, soft_wrap=True)
    if args.json is not None:
        args.json.write_text(json.dumps(perf.to_json(), indent=1) + "\n")
    return 0


def _verify(args: argparse.Namespace) -> int:
    found = report.load(args.report)
    problems = verify(found, today=date.today())
    for problem in problems:
        print(f"{args.report}: {problem}")
    if not problems:
        print(f"{args.report}: {found.label} conforms; {len(found.results)} cases, digest {found.data['digest'][:16]}")
    return 1 if problems else 0


def _compare(args: argparse.Namespace) -> int:
    found = compare(report.intact(args.before), report.intact(args.after))
    for title, lines in (("regression", found.regressions), ("improvement", found.improvements)):
        for line in lines:
            print(f"{title}: {line}")
    print(f"{len(found.regressions)} regressions, {len(found.improvements)} improvements, {len(found.new)} new cases")
    return 1 if found.regressions else 0


def _matrix(args: argparse.Namespace) -> int:
    text = overview([report.intact(path) for path in args.reports])
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text)
    return 0


def _mustpass(args: argparse.Namespace) -> int:
    if args.write:
        print(f"{mustpass.write()} cases recorded, {mustpass.sha256(mustpass.recorded())}")
        return 0
    for problem in (problems := mustpass.problems()):
        print(problem)
    return 1 if problems else 0


def _new(args: argparse.Namespace) -> int:
    folder = scaffold.create(args.name, args.directory)
    print(f"{folder}: next, pip install -e {folder} && sglang-conformance run {args.name}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-conformance", description="The conformance suite of sglang-core backends."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run the suite on a device")
    run.set_defaults(do=_run)
    run.add_argument("device", metavar="DEVICE", help="backend name, or name:index")
    run.add_argument(
        "-k", action="append", default=[], metavar="TEXT", help="only cases whose title contains TEXT; repeatable"
    )
    run.add_argument("--level", choices=("ops", "e2e"), help="only cases of ops and the device, or of engines")
    run.add_argument("--full", action="store_true", help="long cases too; what a report to publish needs")
    run.add_argument("--strict", action="store_true", help="what works and is not claimed fails")
    run.add_argument("--seed", type=int, default=0, help="seed of every case's numbers (default 0)")
    run.add_argument("--num-threads", type=int, metavar="N", help="threads of a device that is the host itself")
    run.add_argument("--jobs", type=int, default=1, metavar="N", help="ops tested at the same time (default 1)")
    run.add_argument(
        "--case-timeout",
        type=float,
        default=CASE_LIMIT,
        metavar="S",
        help=f"seconds after which a case has failed (default {CASE_LIMIT:g})",
    )
    run.add_argument("--in-process", action="store_true", help="no process an op: for debuggers")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    run.add_argument("--html", type=Path, metavar="FILE", help="write it there as one HTML page")
    run.add_argument("--markdown", type=Path, metavar="FILE", help="write its matrix there")
    run.add_argument("-v", "--verbose", action="store_true", help="a line for every case")
    run.add_argument("--perf", action="store_true", help="measure ops, too, for the report: no figure is a verdict")
    perf = commands.add_parser("perf", help="measure each op against the device's own bandwidth and matmul rate")
    perf.set_defaults(do=_perf)
    perf.add_argument("device", metavar="DEVICE", help="backend name, or name:index")
    perf.add_argument(
        "-k", action="append", default=[], metavar="TEXT", help="only what has TEXT in its title; repeatable"
    )
    perf.add_argument("--seed", type=int, default=0, help="seed of the numbers (default 0)")
    perf.add_argument("--num-threads", type=int, metavar="N", help="threads of a device that is the host itself")
    perf.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        metavar="S",
        help=f"seconds after which nothing more is begun (default {LIMIT:g})",
    )
    perf.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    perf.add_argument("-v", "--verbose", action="store_true", help="say of each op why it was not measured")
    check = commands.add_parser("verify", help="check a report offline: is it whole, and does its device conform?")
    check.set_defaults(do=_verify)
    check.add_argument("report", type=Path, metavar="REPORT")
    two = commands.add_parser("compare", help="what became worse between two reports; exit code 1 where anything did")
    two.set_defaults(do=_compare)
    two.add_argument("before", type=Path, metavar="A")
    two.add_argument("after", type=Path, metavar="B")
    side = commands.add_parser("matrix", help="a Markdown page of several reports")
    side.set_defaults(do=_matrix)
    side.add_argument("reports", type=Path, nargs="+", metavar="REPORT")
    side.add_argument("-o", "--output", type=Path, metavar="FILE")
    cases = commands.add_parser("mustpass", help="compare the installed cases with the list that is checked in")
    cases.set_defaults(do=_mustpass)
    cases.add_argument("--write", action="store_true", help="record the installed cases: for changes of the suite")
    plugin = commands.add_parser("plugin", help="start a backend package").add_subparsers(
        required=True, metavar="COMMAND"
    )
    new = plugin.add_parser("new", help="write a package that passes `base` as it is")
    new.set_defaults(do=_new)
    new.add_argument("name", metavar="NAME", help="the device's name, as users will type it")
    new.add_argument("--directory", type=Path, default=Path(), metavar="DIR", help="where to put sglang-NAME/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
