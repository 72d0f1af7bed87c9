"""One picture a part: bars of what was reached beside what must be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

Done = Mapping[str, Mapping[str, Any]]


def draw(part: str, done: Done, path: Path, title: str) -> bool:
    """Write a PNG of what there is to show; False where that is nothing, or where matplotlib is not there."""
    bars = (
        reached(done) if part in ("kernels", "engine") else verdicts(done) if part == "conformance" else registers(done)
    )
    if not bars:
        return False
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name, _, _ in bars]
    figure, axes = pyplot.subplots(figsize=(10, 1.2 + 0.32 * len(bars)))
    colours = ["tab:green" if not target or value >= target else "tab:orange" for _, value, target in bars]
    axes.barh(names, [value for _, value, _ in bars], color=colours)
    for i, (_, _, target) in enumerate(bars):
        if target:
            axes.plot([target, target], [i - 0.4, i + 0.4], color="black")
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


Bars = list[tuple[str, float, float]]  # name, value, target


def reached(done: Done) -> Bars:
    """Shares of the floor; the black mark is the target."""
    return [(name, f["reached"], f.get("target", 0.0)) for name, f in done.items() if "reached" in f]


def verdicts(done: Done) -> Bars:
    return [(verdict, float(count), 0.0) for verdict, count in done.get("summary", {}).get("verdicts", {}).items()]


def registers(done: Done) -> Bars:
    return [(name.removeprefix("compile "), float(f["registers"]), 0.0) for name, f in done.items() if "registers" in f]
