"""A run as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from sglang_core.bench.metrics import Distribution, RequestRecord, Summary

LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between tokens",
    "e2e": "whole request",
    "late": "sent after due",
}
LATENCY_COLUMNS = ("ms", "mean>", "p50>", "p90>", "p95>", "p99>", "max>")
THROUGHPUT_BINS = 60

Row = tuple[str, ...]


def count_rows(summary: Summary) -> list[Row]:
    """(what, value) lines of a run: requests, tokens, throughput."""
    hit = summary.cached_tokens / summary.prompt_tokens if summary.prompt_tokens else 0.0
    return [
        ("requests completed", str(summary.completed)),
        ("requests failed", str(summary.failed)),
        ("duration", f"{summary.duration:.2f} s"),
        ("mean concurrency", f"{summary.mean_concurrency:.1f}"),
        ("prompt tokens", f"{summary.prompt_tokens}"),
        ("  served from cache", f"{summary.cached_tokens} ({hit:.1%})"),
        ("output tokens", f"{summary.output_tokens}"),
        ("requests/s", f"{summary.request_throughput:.2f}"),
        ("input tokens/s", f"{summary.input_throughput:.1f}"),
        ("output tokens/s", f"{summary.output_throughput:.1f}"),
        ("total tokens/s", f"{summary.total_throughput:.1f}"),
    ]


def latency_rows(summary: Summary) -> list[Row]:
    """A row of milliseconds for each latency that was measured."""
    rows: list[Row] = []
    for name, title in LATENCIES.items():
        d: Distribution | None = getattr(summary, name)
        if d is not None:
            rows.append((f"{title} ({name})", *(f"{v:.2f}" for v in dataclasses.astuple(d))))
    return rows


def warnings(summary: Summary) -> list[str]:
    """What a reader of the numbers must know, failures first."""
    found = [f"{count} requests failed: {error}" for error, count in summary.errors.items()]
    if summary.ended_early:
        found.append(
            f"{summary.ended_early} answers are shorter than asked for: this server does not honour ignore_eos"
        )
    if summary.tokens_per_event > 1.05:
        found.append(f"{summary.tokens_per_event:.2f} tokens came per event, so gaps between tokens (itl) are averages")
    return found


def to_json(config: dict[str, Any], summary: Summary, records: Iterable[RequestRecord] = ()) -> dict[str, Any]:
    """Plain data that `json` writes and reads back; infinite settings become the text 'inf'."""
    return {
        "config": {k: "inf" if v == math.inf else v for k, v in config.items()},
        "summary": dataclasses.asdict(summary),
        "requests": [dataclasses.asdict(record) for record in records],
    }


def write_json(path: str, document: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(document, indent=1) + "\n")


def plot(path: str, title: str, records: Sequence[RequestRecord]) -> None:
    """Four panels: how TTFT, token gaps and whole requests are distributed, and output throughput over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = [r for r in records if r.ok and r.token_times]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    figure.suptitle(title)
    _distribution(axes[0][0], "time to first token, ms", [r.ttft for r in done])
    _distribution(axes[0][1], "between tokens, ms", [gap for r in done for gap in r.inter_token()])
    _distribution(axes[1][0], "whole request, ms", [r.e2e for r in done])
    _throughput(axes[1][1], done)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _distribution(axis: Any, label: str, seconds: Sequence[float]) -> None:
    ordered = sorted(1e3 * s for s in seconds)
    axis.set(xlabel=label, ylabel="share of all", ylim=(0, 1))
    axis.grid(alpha=0.3)
    if ordered:
        axis.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post")


def _throughput(axis: Any, done: Sequence[RequestRecord]) -> None:
    axis.set(xlabel="seconds since start", ylabel="output tokens/s")
    axis.grid(alpha=0.3)
    if not done:
        return
    start = min(r.sent for r in done)
    times, tokens = [], []
    for r in done:
        counts = [0, *r.token_counts]
        times += [t - start for t in r.token_times]
        tokens += [now - before for before, now in pairwise(counts)]
    end = max(times) or 1.0
    per_second = THROUGHPUT_BINS / end
    weights = [n * per_second for n in tokens]
    axis.hist(times, bins=THROUGHPUT_BINS, range=(0.0, end), weights=weights, histtype="stepfilled", alpha=0.6)
