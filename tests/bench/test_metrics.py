"""Metrics from hand-made records, whose numbers can be checked in the head."""

from __future__ import annotations

import pytest

from sglang_core.bench.metrics import Distribution, RequestRecord, percentile, summarize


def record(sent: float, times: list[float], counts: list[int] | None = None, **fields: object) -> RequestRecord:
    counts = counts or list(range(1, len(times) + 1))
    made = RequestRecord(due=sent, sent=sent, end=times[-1], token_times=times, token_counts=counts)
    made.output_tokens = made.wanted_tokens = counts[-1]
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_latencies_of_one_request() -> None:
    r = record(1.0, [1.5, 1.6, 1.8])
    assert r.ttft == pytest.approx(0.5)
    assert r.inter_token() == pytest.approx([0.1, 0.2])
    assert r.tpot == pytest.approx(0.15)
    assert r.e2e == pytest.approx(0.8)


def test_an_event_with_several_tokens_shares_its_gap() -> None:
    r = record(0.0, [1.0, 1.4], [1, 5])
    assert r.inter_token() == pytest.approx([0.1] * 4)
    assert r.tpot == pytest.approx(0.1)


def test_one_event_has_no_time_per_token() -> None:
    assert record(0.0, [1.0]).tpot is None


def test_throughput_counts_from_first_sent_to_last_end() -> None:
    summary = summarize(
        [record(1.0, [2.0, 3.0], prompt_tokens=10, cached_tokens=4), record(2.0, [3.0, 5.0], prompt_tokens=6)]
    )
    assert summary.duration == pytest.approx(4.0)
    assert (summary.prompt_tokens, summary.cached_tokens, summary.output_tokens) == (16, 4, 4)
    assert summary.request_throughput == pytest.approx(0.5)
    assert summary.input_throughput == pytest.approx(4.0)
    assert summary.output_throughput == pytest.approx(1.0)
    assert summary.total_throughput == pytest.approx(5.0)
    assert summary.mean_concurrency == pytest.approx((2 + 3) / 4)


def test_failures_are_counted_by_cause_and_measure_nothing() -> None:
    failed = [record(0.0, [9.0], error="HTTP 500: x", prompt_tokens=99) for _ in range(2)]
    summary = summarize([record(0.0, [1.0, 2.0]), *failed])
    assert (summary.completed, summary.failed, summary.errors) == (1, 2, {"HTTP 500: x": 2})
    assert summary.prompt_tokens == 0
    assert summary.ttft is not None
    assert summary.ttft.max == pytest.approx(1000)


def test_answers_that_end_early_are_counted() -> None:
    assert summarize([record(0.0, [1.0], wanted_tokens=5)]).ended_early == 1


def test_nothing_measured_is_none_not_zero() -> None:
    summary = summarize([])
    assert summary.ttft is None
    assert summary.duration == 0


def test_percentiles_are_linear_between_ranks() -> None:
    assert percentile([0.0, 10.0], 50) == 5.0
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 90) == pytest.approx(4.6)
    assert percentile([7.0], 99) == 7.0
    d = Distribution.of([0.003, 0.001, 0.002])
    assert d is not None
    assert (d.p50, d.max, d.mean) == (2.0, 3.0, pytest.approx(2.0))
