"""Prometheus metrics in a registry of their own: what the server times itself, and the engine's gauges at each scrape."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from sglang_core.engine.requests import GenerateChunk, GenerateRequest

CONTENT_TYPE = CONTENT_TYPE_LATEST
PREFIX = "sglang_"
THROUGHPUT_WINDOW = 10  # seconds
# The engine's words -> SGLang's metric names and a help line; an unknown gauge is served as sglang_<its name>.
GAUGES = {
    "running": ("num_running_reqs", "requests being computed"),
    "waiting": ("num_queue_reqs", "requests waiting for their first step"),
    "token_usage": ("token_usage", "share of the KV pool in use"),
    "cache_hit_rate": ("cache_hit_rate", "share of prompt tokens served from the radix cache"),
    "gen_throughput": ("gen_throughput", "generated tokens a second"),
}
COUNTED_HERE = {"prompt_tokens", "cached_tokens", "output_tokens"}  # as counters, once a request has ended
COUNTERS = {
    "eager_steps": ("eager_steps", "steps that no bucket held, run kernel by kernel where others are replayed"),
    "fallbacks": ("fallbacks", "ops bound to another kernel than the one that claims them"),
    "late_compiles": ("late_compiles", "step programs compiled while serving, for which requests waited"),
    "retractions": ("retractions", "requests put back to waiting as the KV pool ran out"),
}
TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
E2E_BUCKETS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 102.4, 204.8, 409.6, 819.2)


class Metrics:
    """One server's counters and histograms, each with the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.throughput = Throughput()
        self.engine = EngineStats(model_name, self.throughput)
        self.registry.register(self.engine)
        label = ("model_name",)

        def counter(name: str, help_line: str) -> Counter:
            return Counter(PREFIX + name, help_line, label, registry=self.registry).labels(model_name)

        def histogram(name: str, help_line: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(PREFIX + name, help_line, label, buckets=buckets, registry=self.registry)
            return made.labels(model_name)

        self.prompt_tokens = counter("prompt_tokens", "prompt tokens of answered requests")
        self.cached_tokens = counter("cached_tokens", "prompt tokens served from the radix cache")
        self.generation_tokens = counter("generation_tokens", "generated tokens")
        self.ttft = histogram("time_to_first_token_seconds", "arrival to first token, streamed requests", TTFT_BUCKETS)
        self.itl = histogram(
            "inter_token_latency_seconds", "between tokens of one answer, streamed requests", ITL_BUCKETS
        )
        self.e2e = histogram("e2e_request_latency_seconds", "arrival to last token", E2E_BUCKETS)
        requests = Counter(
            PREFIX + "num_requests", "answers by how they ended", (*label, "finish_reason"), registry=self.registry
        )
        self.finished = {r: requests.labels(model_name, r) for r in ("stop", "length", "abort", "error")}

    def render(self, stats: Mapping[str, float], is_alive: bool) -> bytes:
        self.engine.stats, self.engine.is_alive = dict(stats), is_alive
        return generate_latest(self.registry)


class Throughput:
    """Generated tokens a second over the last whole seconds."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque(maxlen=THROUGHPUT_WINDOW + 1)  # (second, tokens in it)

    def add(self, num_tokens: int, now: float) -> None:
        second = int(now)
        if self._seconds and self._seconds[-1][0] == second:
            num_tokens += self._seconds.pop()[1]
        self._seconds.append((second, num_tokens))

    def rate(self, now: float) -> float:
        second = int(now)
        return sum(n for at, n in self._seconds if second - THROUGHPUT_WINDOW <= at < second) / THROUGHPUT_WINDOW


class EngineStats(Collector):
    """The engine's gauges of the last `Client.stats()`."""

    def __init__(self, model_name: str, throughput: Throughput) -> None:
        self.model_name, self.throughput = model_name, throughput
        self.stats: dict[str, float] = {}
        self.is_alive = True

    def collect(self) -> Iterator[Metric]:
        stats = {
            "gen_throughput": self.throughput.rate(time.monotonic()),
            "fallbacks": 0,
            "retractions": 0,
            **self.stats,
        }
        yield self._labelled(
            GaugeMetricFamily(PREFIX + "engine_up", "1 while the engine runs", labels=["model_name"]), self.is_alive
        )
        for key, value in stats.items():
            if key in COUNTED_HERE:
                continue
            if key in COUNTERS:
                name, help_line = COUNTERS[key]
                yield self._labelled(CounterMetricFamily(PREFIX + name, help_line, labels=["model_name"]), value)
            else:
                name, help_line = GAUGES.get(key, (re.sub(r"\W", "_", key), f"the engine's {key}"))
                yield self._labelled(GaugeMetricFamily(PREFIX + name, help_line, labels=["model_name"]), value)

    def _labelled(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self.model_name], float(value))
        return family


class RequestMeter:
    """Times one request as its chunks pass. `metrics` is None where they are off; the log line has its numbers still."""

    def __init__(self, metrics: Metrics | None, request: GenerateRequest) -> None:
        self._metrics = metrics
        self._streamed = request.stream
        self._open = set(range(request.sampling.n))
        self._last: dict[int, float] = {}  # answer -> when its latest tokens came
        self.start = time.monotonic()
        self.ttft: float | None = None
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.finish_reasons: list[str] = []

    def on_chunk(self, chunk: GenerateChunk) -> None:
        now = time.monotonic()
        if new := len(chunk.token_ids):
            self.completion_tokens += new
            self._time_tokens(chunk.index, new, now)
        if not self.prompt_tokens:
            self.prompt_tokens, self.cached_tokens = chunk.prompt_tokens, chunk.cached_tokens
        if chunk.finish_reason is not None:
            self._finish(chunk.index, chunk.finish_reason.type)

    def close(self, how: str) -> None:
        """The request is over; answers without an end of their own ended by `how`: "abort" or "error"."""
        for index in sorted(self._open):
            self._finish(index, how)
        if self._metrics is not None:
            self._metrics.prompt_tokens.inc(self.prompt_tokens)
            self._metrics.cached_tokens.inc(self.cached_tokens)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def _time_tokens(self, index: int, new: int, now: float) -> None:
        last = self._last.get(index)
        self._last[index] = now
        if self.ttft is None and self._streamed:
            self.ttft = now - self.start
        if self._metrics is None:
            return
        self._metrics.generation_tokens.inc(new)
        self._metrics.throughput.add(new, now)
        if not self._streamed:
            return
        if last is None:
            self._metrics.ttft.observe(now - self.start)
        else:
            for _ in range(new):
                self._metrics.itl.observe((now - last) / new)

    def _finish(self, index: int, reason: str) -> None:
        if index not in self._open:
            return
        self._open.discard(index)
        self.finish_reasons.append(reason)
        if self._metrics is not None:
            self._metrics.finished[reason].inc()
            if reason in ("stop", "length"):
                self._metrics.e2e.observe(self.elapsed)
