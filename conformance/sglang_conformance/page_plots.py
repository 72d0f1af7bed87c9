"""The page's plots: HTML where they must fit a phone, one SVG where axes cross."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from sglang_conformance.matrix import dtypes_of
from sglang_conformance.perf.figures import Perf, Row
from sglang_conformance.perf.table import duration
from sglang_conformance.result import Result

DECADES = (-4, 1)  # of errors shown: 10^-4 to 10^1; the line of what is allowed stands at 80% (page.css)
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 340, 62, 40  # of the roofline plot
REFERENCE = "reference"


def error_strips(results: Sequence[Result]) -> str:
    """One strip an op, the closest to its bound first; one dot a case, a lane a dtype."""
    by_op: dict[str, list[Result]] = {}
    for r in results:
        if r.errors:
            by_op.setdefault(r.op, []).append(r)
    if not by_op:
        return ""
    dtypes = dtypes_of([r for mine in by_op.values() for r in mine])
    key = "".join(f'<span><i class="{dtype}"></i>{dtype}</span>' for dtype in dtypes)
    strips = []
    for op, mine in sorted(by_op.items(), key=lambda item: -max(r.ratio for r in item[1])):
        worst = max(r.ratio for r in mine)
        strips.append(
            f'<div class="strip"><b class="op">{escape(op)}</b><div class="lane">{"".join(map(_dot, mine))}</div>'
            f'<em title="the largest error, of what is allowed">{worst:.0%}</em></div>'
        )
    ticks = "".join(
        f'<span style="left:{_left(10.0**power):.0f}%">{10.0**power:g}</span>'
        for power in range(DECADES[0], DECADES[1])
    )
    axis = f'<div class="axis"><b></b><div>{ticks}</div><em></em></div>'
    return f'<div class="key">{key}</div>{"".join(strips)}{axis}'


def _dot(r: Result) -> str:
    over = " over" if r.ratio > 1 else ""
    title = escape(f"{r.title}: {r.ratio:.2g} of what is allowed")
    return f'<i class="{r.dtype}{over}" style="left:{_left(r.ratio):.1f}%" title="{title}"></i>'


def _left(ratio: float) -> float:
    """Percent of the logarithmic axis; what is smaller or larger than it shows stands at its ends."""
    low, high = DECADES
    power = min(max(math.log10(ratio) if ratio > 0 else low, low), high)
    return 100 * (power - low) / (high - low)


def perf_bars(perf: Perf) -> str:
    """Every load: how much of the roofline it reaches."""
    by_op: dict[str, list[Row]] = {}
    for row in perf.rows:
        by_op.setdefault(row.label, []).append(row)
    parts = []
    for op, rows in by_op.items():
        runs = ", ".join(sorted({row.provider.upper() if row.provider == REFERENCE else row.provider for row in rows}))
        parts.append(f'<div><h3><span class="op">{escape(op)}</span> <small>{escape(runs)}</small></h3>')
        for row in rows:
            style = "load reference" if row.provider == REFERENCE else "load"
            width = min(100.0, 100 * row.share)
            parts.append(
                f'<div class="{style}" title="{row.bound}"><b>{escape(row.name)}</b><div><i style="width:{width:.1f}%"></i></div>'
                f"<em>{row.share:.0%} <span>· {duration(row.seconds)}</span></em></div>"
            )
        parts.append("</div>")
    return f'<div class="two">{"".join(parts)}</div>'


def roofline(perf: Perf) -> str:
    """Operations a second over operations a byte, both logarithmic, under the roof of the two rates."""
    rows = [row for row in perf.rows if row.flops]
    if not rows:
        return ""
    bandwidth, rate = perf.roofs
    ridge = rate / bandwidth
    xs = [row.flops / row.nbytes for row in rows] + [ridge]
    ys = [row.flops / row.seconds for row in rows] + [rate]
    x = _Axis(min(xs), max(xs), LEFT, WIDTH - 12)
    y = _Axis(min([*ys, x.low * bandwidth]), max(ys), HEIGHT - BOTTOM, 14)
    marks = [f'<line class="grid" x1="{x(v)}" x2="{x(v)}" y1="14" y2="{HEIGHT - BOTTOM}"/>' for v in x.decades()]
    marks += [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y(v)}" y2="{y(v)}"/>' for v in y.decades()]
    marks += [f'<text x="{x(v)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{v:g}</text>' for v in x.decades()]
    marks += [f'<text x="{LEFT - 6}" y="{y(v) + 4}" text-anchor="end">{v / 1e9:g}</text>' for v in y.decades()]
    roof = f"{x(x.low)},{y(x.low * bandwidth)} {x(ridge)},{y(rate)} {x(x.high)},{y(rate)}"
    marks.append(f'<polyline class="roof" points="{roof}"/>')
    for row in rows:
        style = ' class="reference"' if row.provider == REFERENCE else ""
        title = escape(f"{row.label} [{row.name}]: {row.share:.0%} of the roofline")
        spot = f'cx="{x(row.flops / row.nbytes)}" cy="{y(row.flops / row.seconds)}"'
        marks.append(f'<circle{style} {spot} r="5"><title>{title}</title></circle>')
    marks.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">operations a byte</text>')
    marks.append(f'<text x="{LEFT + 6}" y="28">GFLOP/s</text>')
    label = "speed of ops against the device's roofline"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(marks)}</svg>'


class _Axis:
    """A logarithmic axis over whole decades, from pixel `a` to pixel `b`."""

    def __init__(self, least: float, most: float, a: float, b: float) -> None:
        low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
        self._low, self._high = low, max(high, low + 1)
        self.low, self.high = 10.0**self._low, 10.0**self._high
        self._a, self._b = a, b

    def __call__(self, value: float) -> float:
        part = (math.log10(value) - self._low) / (self._high - self._low)
        return round(self._a + part * (self._b - self._a), 1)

    def decades(self) -> list[float]:
        return [10.0**power for power in range(self._low, self._high + 1)]
