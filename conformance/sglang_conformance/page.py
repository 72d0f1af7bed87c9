"""The report as one HTML file: what holds, where it fails, how far results are off, how fast. It loads nothing and runs no script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from sglang_conformance.matrix import dtypes_of, text, worst
from sglang_conformance.page_plots import error_strips, perf_bars, roofline
from sglang_conformance.perf.table import roofs
from sglang_conformance.profiles import level_of
from sglang_conformance.report import Report
from sglang_conformance.result import Result, Verdict

# How verdicts are named to people, in the order of the bar.
WORDS = {
    Verdict.PASS: "pass",
    Verdict.EMULATED: "emulated",
    Verdict.REFERENCE: "on reference bodies",
    Verdict.NOT_CLAIMED: "not claimed",
    Verdict.WAIVED: "waived",
    Verdict.FAIL: "fail",
}


def html(report: Report) -> str:
    parts = [
        _head(report),
        _problems(report),
        _section("Profiles", "What a whole kind of model needs, natively.", _profiles(report)),
        _section("Ops", "The worst verdict of an op's cases in each dtype, and their number.", _ops(report.results)),
        _section(
            "Weight formats",
            "Three squares: float32, bfloat16, float16. An empty one has no case.",
            _formats(report.results),
        ),
        _section(
            "Errors",
            "Each dot is a case: its largest error, as a share of what is allowed. Past the line it fails. Results that must"
            " be equal to the bit have no dot.",
            error_strips(report.results),
        ),
        _perf(report),
        _details("Who ran, and why", _explain(report)),
        _details(f"All {len(report.results)} cases", _cases(report.results)),
        f"<footer>Cases {report.data['mustpass_sha256'][:16]}, digest {escape(report.data['digest'][:16])}, seed"
        f" {report.data['seed']}. Check it with <code>sglang-conformance verify</code>.</footer>",
    ]
    title = f"Conformance of {escape(report.label)}"
    style = (resources.files(__package__) / "page.css").read_text()
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>\n{style}</style></head>\n<body><main>\n'
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _head(report: Report) -> str:
    data, device = report.data, report.data["device"]
    state = ("", "conforms") if report.conformant else (" no", "does not conform")
    seen = [(v, data["counts"][v.value]) for v in WORDS if data["counts"].get(v.value)]
    bar = "".join(f'<i class="{v.value}" style="flex:{n}" title="{n} {WORDS[v]}"></i>' for v, n in seen)
    key = "".join(f'<span><i class="{v.value}"></i>{n} {WORDS[v]}</span>' for v, n in seen)
    versions = " · ".join(f"{name} {value}" for name, value in (device["versions"] | data["versions"]).items())
    native = {r.op for r in report.results if r.verdict in (Verdict.PASS, Verdict.EMULATED)}
    held = sum(value != "no" for value in data["levels"].values())
    tiles = {
        f"{len(report.results):,}": f"cases, {data['tier']} tier{', some of them' if data['partial'] else ''}",
        f"{len(native)} of {len({r.op for r in report.results})}": "ops and device parts natively",
        f"{held} of {len(data['levels'])}": "profiles hold",
        f"{max((r.ratio for r in report.results), default=0.0):.0%}": "of the allowed error, at worst",
        f"{data['seconds']:g} s": f"on {data['made'][:10]}",
    }
    shown = "".join(f"<div><b>{value}</b><span>{escape(what)}</span></div>" for value, what in tiles.items())
    return (
        f'<header><div><h1>{escape(device["name"])}</h1><span class="soft"><code>{escape(device["path"])}</code>'
        f' · backend {escape(device["backend"])}</span></div><span class="state{state[0]}">{state[1]}</span></header>'
        f'<div class="bar">{bar}</div><div class="key">{key}</div><div class="tiles">{shown}</div>'
        f'<p class="soft"><small>{escape(versions)}</small></p>'
    )


def _section(title: str, what: str, content: str) -> str:
    return f"<section><h2>{title}</h2><p>{what}</p>{content}</section>" if content else ""


def _details(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _problems(report: Report) -> str:
    """What stands between this device and conforming, and what is waived."""
    found = [*report.data["problems"]]
    found += [f"{r.title}: {r.reason}" for r in report.results if r.verdict in (Verdict.FAIL, Verdict.WAIVED)]
    items = "".join(f"<li>{escape(item)}</li>" for item in found)
    return f'<section class="bad"><h2>Problems</h2><ul>{items}</ul></section>' if found else ""


def _profiles(report: Report) -> str:
    stated = report.data["profiles"]
    chips = []
    for name, held in report.data["levels"].items():
        level = level_of(name)
        note = "" if (name in stated) == (held != "no") else " stated" if name in stated else " not stated"
        what = escape(level.what if level else "")
        chips.append(f'<span class="chip {held}" title="{what}">{escape(name)}<small>{note}</small></span>')
    options = [
        f'<span class="chip native">{escape(name)}</span>' for name in stated if name not in report.data["levels"]
    ]
    rows = [f'<div class="chips">{"".join(chips)}</div>' if chips else ""]
    rows += [f'<h3>Options stated</h3><div class="chips">{"".join(options)}</div>' if options else ""]
    return "".join(rows)


def _ops(results: Sequence[Result]) -> str:
    """Cases of no weight format, and of dense weights."""
    mine = [r for r in results if r.fmt in ("*", "dense")]
    dtypes = dtypes_of(mine)
    body = []
    for op in sorted({r.op for r in mine}):
        cells = [Counter(r.verdict for r in mine if (r.op, r.dtype) == (op, dtype)) for dtype in dtypes]
        seconds = sum(r.seconds for r in mine if r.op == op)
        body.append([_td(op, "op"), *map(_heat, cells), _td(f"{seconds:.1f} s", "num")])
    return _table(("op", *dtypes, "took"), body, "heat full")


def _heat(cell: Counter[Verdict]) -> str:
    found = worst(cell)
    if found is None:
        return "<td></td>"
    word = (
        ""
        if found is Verdict.NOT_CLAIMED
        else f'<span class="word"> {WORDS[found].removeprefix("on ").split()[0]}</span>'
    )
    return f'<td class="v {found.value}" title="{text(cell)}">{cell[found]}{word}</td>'


def _formats(results: Sequence[Result]) -> str:
    mine = [r for r in results if r.fmt not in ("*", "dense")]
    if not mine:
        return ""
    ops, dtypes = sorted({r.op for r in mine}), dtypes_of(mine)
    body = []
    for fmt in sorted({r.fmt for r in mine}):
        cells = [_td(fmt, "op")]
        for op in ops:
            squares = ""
            for dtype in dtypes:
                cell = Counter(r.verdict for r in mine if (r.fmt, r.op, r.dtype) == (fmt, op, dtype))
                found = worst(cell)
                title = f"{dtype}: {text(cell)}" if found else f"{dtype}: no case"
                squares += f'<i class="{found.value if found else ""}" title="{title}"></i>'
            cells.append(f'<td><div class="three">{squares}</div></td>')
        body.append(cells)
    return _table(("format", *ops), body, "heat")


def _perf(report: Report) -> str:
    perf = report.perf
    if perf is None:
        why = (report.data["perf"] or {}).get("error")
        return _section("Speed", f"Not measured: {escape(why)}.", "<span></span>") if why else ""
    where = f"{perf.dtype}, {roofs(perf)} in this run{', emulated' if perf.emulated else ''}"
    what = f"Against the device's own roofline: {where}. No figure is a verdict."
    skipped = Counter(s.reason for s in perf.skipped)
    left = "".join(f"<p><small>{n} not measured: {escape(why)}.</small></p>" for why, n in skipped.items())
    return _section("Speed", what, roofline(perf) + perf_bars(perf) + left)


def _table(head: Iterable[str], body: Iterable[Iterable[str]], style: str) -> str:
    """Cells are HTML already."""
    cells = "".join(f"<tr>{''.join(row)}</tr>" for row in body)
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    return f'<div class="wide"><table class="{style}"><tr>{top}</tr>{cells}</table></div>'


def _td(content: str, style: str = "") -> str:
    return f'<td class="{style}">{escape(content)}</td>'


def _explain(report: Report) -> str:
    keys = ("op", "fmt", "dtype", "provider", "why")
    body = [
        [_td(row[key], "op" if key == "op" else "") for key in keys] + [_td(", ".join(row["kernels"]), "op")]
        for row in report.data["explain"]
    ]
    return _table(("op", "format", "dtype", "provider", "why", "kernels"), body, "plain")


def _cases(results: Sequence[Result]) -> str:
    body = [
        [
            f'<td><span class="v {r.verdict.value}">{r.verdict.value}</span></td>',
            _td(r.title, "op"),
            _td(r.provider),
            _td(f"{r.ratio:.2g}" if r.errors else ""),
            _td(f"{r.seconds:.2f} s"),
            _td(r.reason),
        ]
        for r in results
    ]
    return _table(("verdict", "case", "provider", "error", "took", ""), body, "plain")
