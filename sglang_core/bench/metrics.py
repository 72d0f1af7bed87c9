"""From the times of each request's tokens to latencies and throughput. Seconds inside, milliseconds in summaries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

PERCENTILES = (50, 90, 95, 99)


@dataclass(kw_only=True, slots=True)
class RequestRecord:
    """What happened to one request. Times are seconds on the load generator's clock.

    `token_times[i]` is when the event with tokens `[token_counts[i - 1], token_counts[i])` came; servers that do not count
    in their events get one token an event.
    """

    due: float = 0.0
    sent: float = 0.0
    end: float = 0.0
    token_times: list[float] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)  # cumulative
    wanted_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.sent

    @property
    def e2e(self) -> float:
        return self.end - self.sent

    @property
    def tpot(self) -> float | None:
        """Mean time of an output token after the first event; None where there was only one event."""
        after_first = self.output_tokens - self.token_counts[0]
        return (self.token_times[-1] - self.token_times[0]) / after_first if after_first > 0 else None

    def inter_token(self) -> list[float]:
        """Gaps between tokens. An event with several tokens shares its gap out over them."""
        gaps: list[float] = []
        events = pairwise(zip(self.token_times, self.token_counts, strict=True))
        for (before, count_before), (now, count) in events:
            new = max(1, count - count_before)
            gaps += [(now - before) / new] * new
        return gaps


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Distribution | None:
        """None where nothing was measured."""
        if not seconds:
            return None
        ms = sorted(1e3 * s for s in seconds)
        p50, p90, p95, p99 = (percentile(ms, p) for p in PERCENTILES)
        return cls(mean=sum(ms) / len(ms), p50=p50, p90=p90, p95=p95, p99=p99, max=ms[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One run. Token throughputs are per second, over the time from the first request sent to the last one ended."""

    completed: int
    failed: int
    errors: dict[str, int]
    ended_early: int  # answers shorter than asked for: the server stops at EOS
    duration: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    tokens_per_event: float
    request_throughput: float
    input_throughput: float
    output_throughput: float
    total_throughput: float
    mean_concurrency: float
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    late: Distribution | None  # how long after it was due a request was sent: --max-concurrency, or a slow client


def summarize(records: Sequence[RequestRecord]) -> Summary:
    """Failed requests count in `failed` and `errors` and nowhere else."""
    done = [r for r in records if r.ok]
    duration = max((r.end for r in records), default=0.0) - min((r.sent for r in records), default=0.0)
    per_second = 1 / duration if duration > 0 else 0.0
    prompt_tokens = sum(r.prompt_tokens for r in done)
    output_tokens = sum(r.output_tokens for r in done)
    num_events = sum(len(r.token_times) for r in done)
    started = [r for r in done if r.token_times]
    return Summary(
        completed=len(done),
        failed=len(records) - len(done),
        errors=dict(Counter(r.error for r in records if not r.ok).most_common()),
        ended_early=sum(r.output_tokens < r.wanted_tokens for r in done),
        duration=duration,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(r.cached_tokens for r in done),
        output_tokens=output_tokens,
        tokens_per_event=output_tokens / num_events if num_events else 0.0,
        request_throughput=len(done) * per_second,
        input_throughput=prompt_tokens * per_second,
        output_throughput=output_tokens * per_second,
        total_throughput=(prompt_tokens + output_tokens) * per_second,
        mean_concurrency=sum(r.e2e for r in done) * per_second,
        ttft=Distribution.of([r.ttft for r in started]),
        tpot=Distribution.of([tpot for r in started if (tpot := r.tpot) is not None]),
        itl=Distribution.of([gap for r in started for gap in r.inter_token()]),
        e2e=Distribution.of([r.e2e for r in done]),
        late=Distribution.of([r.sent - r.due for r in records]),
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of `ordered`, which is sorted and not empty."""
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
