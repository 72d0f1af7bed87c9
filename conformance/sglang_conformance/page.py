"""The report as one HTML file: the matrix, the errors as plots, selection's reasons. It loads nothing and runs no script."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

from sglang_conformance.matrix import dtypes_of, rows, text, worst
from sglang_conformance.report import Report
from sglang_conformance.result import Result, Verdict

STYLE = """
:root { color-scheme: light dark; --line: #8884; --ink: #1f2328; --paper: #fff; --faint: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --faint: #9ca3af; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto; max-width: 70rem;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.op, code { font-family: ui-monospace, monospace; font-size: 13px; white-space: nowrap; }
.wide { overflow-x: auto; } .faint { color: var(--faint); }
.v { border-radius: 4px; padding: 0 .4rem; white-space: nowrap; }
.PASS { background: #1a7f3733; } .FAIL { background: #d1242f66; font-weight: 600; } .REFERENCE { background: #0969da26; }
.NOT_CLAIMED { background: #8882; } .EMULATED { background: #8250df33; } .WAIVED { background: #bf870066; }
svg { display: block; width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .grid { stroke: var(--line); } svg .limit { stroke: #d1242f; stroke-width: 1.5; }
svg circle { fill: #0969da; fill-opacity: .55; } svg circle.over { fill: #d1242f; fill-opacity: .9; }
summary { cursor: pointer; }
"""
LEFT, WIDTH, ROW, DECADES = 220, 900, 20, (-4, 1)  # the plot: room for names, its width, a row's height, 10^-4 to 10^1


def html(report: Report) -> str:
    data, device = report.data, report.data["device"]
    state = "conformant" if report.conformant else "not conformant"
    found = " ".join(f'<span class="v {verdict}">{verdict} {n}</span>' for verdict, n in data["counts"].items() if n)
    versions = ", ".join(f"{name} {value}" for name, value in data["versions"].items())
    parts = [
        f"<h1>{escape(device['backend'])}: {state}</h1>",
        f'<p class="faint">{escape(device["name"])} ({escape(device["path"])}), {escape(data["made"])}, {data["tier"]} tier, '
        f"seed {data['seed']}, {data['seconds']} s<br>{escape(versions)}</p>",
        f"<p>{found}</p>",
        _list("Problems", data["problems"]),
        _list("Fails", [f"{r.title}: {r.reason}" for r in report.results if r.verdict is Verdict.FAIL]),
        _list("Waived", [f"{r.title}: {r.reason}" for r in report.results if r.verdict is Verdict.WAIVED]),
        _levels(report),
        "<h2>Ops</h2>",
        _matrix(report.results),
        "<h2>Errors</h2><p>Each dot is a case: the largest error of its outputs, as a share of what is allowed. Past the line it"
        " fails. Outputs that must be equal to the bit have no dot.</p>",
        _plot(report.results),
        "<h2>Who ran, and why</h2>",
        _explain(report),
        f"<details><summary>Every case ({len(report.results)})</summary>{_cases(report.results)}</details>",
        f'<p class="faint">Cases {escape(data["mustpass_sha256"][:16])}, digest {escape(data["digest"][:16])}. '
        "Check it with <code>sglang-conformance verify</code>.</p>",
    ]
    title = f"Conformance of {escape(device['backend'])}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _list(title: str, items: Sequence[str]) -> str:
    return f"<h2>{title}</h2><ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>" if items else ""


def _table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already."""
    cells = "".join(f"<tr>{''.join(row)}</tr>" for row in body)
    return f'<div class="wide"><table><tr>{"".join(f"<th>{escape(h)}</th>" for h in head)}</tr>{cells}</table></div>'


def _td(content: str, style: str = "") -> str:
    return f'<td class="{style}">{escape(content)}</td>'


def _verdict(verdict: Verdict | None, content: str) -> str:
    return "<td></td>" if verdict is None else f'<td><span class="v {verdict.value}">{escape(content)}</span></td>'


def _levels(report: Report) -> str:
    levels: dict[str, str] = report.data["levels"]
    if not levels:
        return ""
    stated = report.data["profiles"]
    body = [[_td(name, "op"), _td(held), _td("stated" if name in stated else "")] for name, held in levels.items()]
    options = ", ".join(name for name in stated if name not in levels)
    return (
        "<h2>Profiles</h2>"
        + _table(("profile", "held natively", ""), body)
        + (f"<p>Options stated: {escape(options)}.</p>" if options else "")
    )


def _matrix(results: Sequence[Result]) -> str:
    dtypes = dtypes_of(results)
    body = [
        [_td(name, "op"), *(_verdict(worst(cell), text(cell)) for d in dtypes for cell in [cells.get(d, Counter())])]
        for name, cells in rows(results)
    ]
    return _table(("op", *dtypes), body)


def _plot(results: Sequence[Result]) -> str:
    """One row an op and dtype, one dot a case."""
    by_row: dict[str, list[Result]] = {}
    for r in sorted(results, key=lambda r: (r.op, r.dtype)):
        if r.errors:
            by_row.setdefault(f"{r.op} {r.dtype}", []).append(r)
    height = ROW * (len(by_row) + 1)
    marks = [
        f'<line class="{"limit" if power == 0 else "grid"}" x1="{_x(10.0**power)}" x2="{_x(10.0**power)}" y1="0" y2="{height - ROW}"/>'
        f'<text x="{_x(10.0**power)}" y="{height - 5}" text-anchor="middle">{10.0**power:g}</text>'
        for power in range(DECADES[0], DECADES[1] + 1)
    ]
    for i, (name, mine) in enumerate(by_row.items()):
        y = ROW * i + ROW / 2
        marks.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        marks += [
            f'<circle cx="{_x(r.ratio)}" cy="{y}" r="4"{" class=" + chr(34) + "over" + chr(34) if r.ratio > 1 else ""}>'
            f"<title>{escape(r.title)}: {r.ratio:.2g} of what is allowed</title></circle>"
            for r in mine
        ]
    return f'<svg viewBox="0 0 {LEFT + WIDTH} {height}" role="img" aria-label="errors by op">{"".join(marks)}</svg>'


def _x(ratio: float) -> float:
    """Where a ratio stands on the logarithmic axis; what is smaller or larger than it shows stands at its ends."""
    low, high = DECADES
    power = min(max(math.log10(ratio) if ratio > 0 else low, low), high)
    return round(LEFT + (power - low) / (high - low) * (WIDTH - 30), 1)


def _explain(report: Report) -> str:
    body = [
        [
            _td(row["op"], "op"),
            _td(row["fmt"]),
            _td(row["dtype"]),
            _td(row["provider"]),
            _td(row["why"]),
            _td(", ".join(row["kernels"])),
        ]
        for row in report.data["explain"]
    ]
    return _table(("op", "format", "dtype", "provider", "why", "kernel"), body)


def _cases(results: Sequence[Result]) -> str:
    body = [
        [
            _verdict(r.verdict, r.verdict.value),
            _td(r.title, "op"),
            _td(r.provider),
            _td(f"{r.ratio:.2g}" if r.errors else ""),
            _td(r.reason),
        ]
        for r in results
    ]
    return _table(("verdict", "case", "provider", "error", ""), body)
