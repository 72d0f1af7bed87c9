"""Op x dtype and format: the table at the heart of every report, and the Markdown made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sglang_conformance.perf.table import duration, roofs
from sglang_conformance.profiles import LEVELS, level_of
from sglang_conformance.report import Report
from sglang_conformance.result import Result, Verdict

# What a cell is coloured and summed up by: the first of these that occurs in it.
WORST = (Verdict.FAIL, Verdict.WAIVED, Verdict.EMULATED, Verdict.PASS, Verdict.REFERENCE, Verdict.NOT_CLAIMED)
DTYPES = ("float32", "bfloat16", "float16")
Cell = Counter[Verdict]


def rows(results: Sequence[Result]) -> list[tuple[str, dict[str, Cell]]]:
    """(op, or op and weight format; dtype -> how often each verdict), by name."""
    found: dict[str, dict[str, Cell]] = {}
    for r in sorted(results, key=lambda r: (r.op, r.fmt)):
        name = r.op if r.fmt == "*" else f"{r.op} ({r.fmt})"
        found.setdefault(name, {}).setdefault(r.dtype, Counter())[r.verdict] += 1
    return list(found.items())


def worst(cell: Cell) -> Verdict | None:
    """What a cell says in a word. None: no case of it."""
    return next((verdict for verdict in WORST if cell[verdict]), None)


def text(cell: Cell) -> str:
    """ "PASS 24", or "PASS 22, NOT_CLAIMED 2"."""
    return ", ".join(f"{verdict.value} {cell[verdict]}" for verdict in WORST if cell[verdict])


def dtypes_of(results: Sequence[Result]) -> list[str]:
    seen = {r.dtype for r in results}
    return [d for d in DTYPES if d in seen] + sorted(seen - set(DTYPES))


def markdown(report: Report) -> str:
    """One report as a page."""
    data = report.data
    lines = [f"# Conformance of {data['device']['backend']}", "", *_facts(report), ""]
    lines += [f"- {problem}" for problem in data["problems"]]
    lines += ["", *_matrix(report.results), "", *_perf(report)]
    return "\n".join(lines)


def overview(reports: Sequence[Report]) -> str:
    """`docs/backends.md`: what each backend with a committed report does, side by side."""
    reports = sorted(reports, key=lambda r: r.label)
    lines = [
        "# What each backend does",
        "",
        "Made by `sglang-conformance matrix` from the reports in `conformance/reports/`; a test compares the two. PASS: claimed, run on the",
        "device, right. REFERENCE: right, and no kernel but the op's body ran. EMULATED: right, and no such device ran it.",
        "NOT_CLAIMED: refused, or not to be run there. Numbers count cases.",
        "",
        "| profile | " + " | ".join(r.label for r in reports) + " |",
        "|---|" + "---|" * len(reports),
    ]
    names = list(dict.fromkeys([*LEVELS, *(name for r in reports for name in r.data["levels"])]))
    for name in names:
        level = level_of(name)
        what = "" if level is None else f": {level.what}"
        lines.append(f"| `{name}`{what} | " + " | ".join(_level(r, name) for r in reports) + " |")
    for report in reports:
        lines += ["", f"## {report.label}", "", *_facts(report), "", *_matrix(report.results)]
    return "\n".join(lines) + "\n"


def _perf(report: Report) -> list[str]:
    """The figures, if there are any: how much of the roofline each op reaches."""
    perf = report.perf
    if perf is None:
        found = report.data["perf"]
        return [f"Speed was not measured: {found['error']}.", ""] if found else []
    lines = [f"{perf.dtype}, {roofs(perf)}{', emulated' if perf.emulated else ''}. No figure is a verdict.", ""]
    lines += ["| op | step | runs | time | of the roofline |", "|---|---|---|---|---|"]
    for row in perf.rows:
        runs = row.provider.upper() if row.provider == "reference" else row.provider
        share = f"{row.share:.0%} of {row.bound}"
        lines.append(f"| `{row.label}` | {row.name} | {runs} | {duration(row.seconds)} | {share} |")
    return [*lines, ""]


def _level(report: Report, name: str) -> str:
    held = report.data["levels"].get(name, "no")
    stated = name in report.data["profiles"]
    return {"no": "no", "native": "yes", "emulated": "emulated", "reference": "on reference bodies"}[held] + (
        "" if stated or held == "no" else " (not stated)"
    )


def _facts(report: Report) -> list[str]:
    data, device = report.data, report.data["device"]
    versions = ", ".join(f"{name} {data['versions'][name]}" for name in ("sglang-core", "sglang-conformance", "torch"))
    found = ", ".join(f"{n} {verdict}" for verdict, n in data["counts"].items() if n)
    return [
        f"{device['name']} (`{device['path']}`), {data['made'][:10]}, {versions}, {data['tier']} tier, seed {data['seed']}.",
        f"{'Conformant' if report.conformant else 'Not conformant'}: {found}. States: {', '.join(data['profiles']) or 'no profile'}.",
    ]


def _matrix(results: Sequence[Result]) -> list[str]:
    dtypes = dtypes_of(results)
    lines = ["| op | " + " | ".join(dtypes) + " |", "|---|" + "---|" * len(dtypes)]
    for name, cells in rows(results):
        lines.append(f"| `{name}` | " + " | ".join(text(cells.get(d, Counter())) for d in dtypes) + " |")
    return lines
