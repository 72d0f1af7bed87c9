"""The figures in a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table

from sglang_conformance.perf.figures import Perf

BAR, WIDE = 20, 125  # characters of a whole roofline; of a terminal that has room for it


def table(perf: Perf, device: str, *, width: int) -> Table:
    """One row a load, the op's name where it changes; rates and bars where `width` characters have room for them."""
    emulated = ", emulated" if perf.emulated else ""
    title = f"{device} in {perf.dtype}{emulated}: {roofs(perf)}"
    made = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("op", "step", "runs"):
        made.add_column(name, no_wrap=True)
    for name in ("time", "roofline", "reached")[: 3 if width >= WIDE else 2]:
        made.add_column(name, justify="right", no_wrap=True)
    if width >= WIDE:
        made.add_column("bound", no_wrap=True)
        made.add_column("", no_wrap=True, min_width=BAR)
    before = ""
    for row in perf.rows:
        runs = row.provider.upper() if row.provider == "reference" else row.provider
        bar = "█" * round(BAR * min(1.0, row.share)) or "▏"
        wide = (reached(row.nbytes, row.flops, row.seconds, row.bound), row.bound, bar) if width >= WIDE else ()
        name = "" if row.label == before else row.label
        style = "dim" if row.provider == "reference" else ""
        made.add_row(name, row.name, runs, duration(row.seconds), f"{row.share:.0%}", *wide, style=style)
        before = row.label
    return made


def roofs(perf: Perf) -> str:
    return f"{perf.roofs[0] / 1e9:,.1f} GB/s and {perf.roofs[1] / 1e9:,.0f} GFLOP/s measured"


def duration(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.1f} µs"


def reached(nbytes: int, flops: int, seconds: float, bound: str) -> str:
    """In the unit of the roof that is the lower one."""
    return f"{nbytes / seconds / 1e9:,.1f} GB/s" if bound == "memory" else f"{flops / seconds / 1e9:,.0f} GFLOP/s"
