"""Reports: rows, warnings, JSON that reads back, and a picture that is one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sglang_core.bench import report
from sglang_core.bench.metrics import RequestRecord, summarize


def records() -> list[RequestRecord]:
    def one(sent: float) -> RequestRecord:
        return RequestRecord(
            due=sent, sent=sent, end=sent + 2, token_times=[sent + 1, sent + 2], token_counts=[1, 2],
            output_tokens=2, wanted_tokens=2, prompt_tokens=10, cached_tokens=5,
        )  # fmt: skip

    return [one(0.0), one(1.0), RequestRecord(sent=0.0, end=0.1, error="HTTP 500: boom")]


def test_rows_say_the_numbers() -> None:
    rows = dict(report.count_rows(summarize(records())))
    assert rows["requests completed"] == "2"
    assert rows["requests failed"] == "1"
    assert rows["  served from cache"] == "10 (50.0%)"
    latencies = {row[0]: row[1] for row in report.latency_rows(summarize(records()))}
    assert latencies["time to first token (ttft)"] == "1000.00"


def test_warnings_name_failures_and_short_answers() -> None:
    made = records()
    made[0].wanted_tokens = 9
    found = report.warnings(summarize(made))
    assert found[0] == "1 requests failed: HTTP 500: boom"
    assert "1 answers are shorter" in found[1]


def test_json_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    report.write_json(str(path), report.to_json({"request_rate": math.inf, "seed": 3}, summarize(records()), records()))
    document = json.loads(path.read_text())
    assert document["config"] == {"request_rate": "inf", "seed": 3}
    assert document["summary"]["completed"] == 2
    assert document["requests"][0]["token_times"] == [1.0, 2.0]


def test_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.png"
    report.plot(str(path), "a run", records())
    assert path.read_bytes().startswith(b"\x89PNG")


def test_throughput_over_time_adds_up_to_the_tokens() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axis = pyplot.subplots()
    report._throughput(axis, [r for r in records() if r.ok])
    [patch] = axis.patches
    corners = patch.get_path().vertices
    xs, ys = corners[:, 0], corners[:, 1]
    area = abs(sum(xs[i] * ys[i + 1] - xs[i + 1] * ys[i] for i in range(len(xs) - 1))) / 2
    pyplot.close(figure)
    assert area == pytest.approx(4)
