"""`bench serve`: a workload against a running server, from the outside."""

from __future__ import annotations

import asyncio
import dataclasses
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from sglang_core.bench.load import HttpSender, run_load
from sglang_core.bench.metrics import RequestRecord, Summary, summarize
from sglang_core.bench.routes import ROUTES
from sglang_core.bench.workload import SAFE_VOCAB, Prompt, poisson_arrivals, random_ids
from sglang_core.errors import SglangError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
WARMUP_INPUT, WARMUP_OUTPUT = 64, 8
WARMUP_SEED = 2**31  # far from a user's, so that warm-up prompts are in nobody's cache later


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Which server, and how to ask it."""

    base_url: str
    route: str = "completions"
    model: str | None = None  # the server's first by default
    api_key: str | None = None
    timeout: float = 600.0  # seconds without a byte


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadOptions:
    """How the workload is sent."""

    request_rate: float = float("inf")
    max_concurrency: int | None = None
    num_warmup: int = 1
    temperature: float = 0.0
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    flush_cache: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeResult:
    """One run: what was asked, what came out, and every request's times."""

    config: dict[str, Any]
    summary: Summary
    records: list[RequestRecord]


class BenchError(SglangError):
    """The server cannot be measured."""


def open_client(target: Target) -> httpx.AsyncClient:
    """A client without a limit on connections. Proxies are not used for this machine."""
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    return httpx.AsyncClient(
        base_url=target.base_url,
        headers=headers,
        timeout=httpx.Timeout(target.timeout, connect=10.0),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=urllib.parse.urlsplit(target.base_url).hostname not in LOOPBACK,
    )


async def run_serve(
    client: httpx.AsyncClient,
    target: Target,
    prompts: list[Prompt],
    options: LoadOptions,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
) -> ServeResult:
    """Warm the server up, then run the workload. Raises BenchError where nothing can be measured."""
    model = target.model or await find_model(client)
    send = HttpSender(
        client, ROUTES[target.route](), model=model, temperature=options.temperature, extra_body=options.extra_body
    )
    await _warm_up(send, options.num_warmup)
    if options.flush_cache:
        await _flush_cache(client)
    arrivals = poisson_arrivals(len(prompts), options.request_rate, options.seed)
    records = await run_load(prompts, arrivals, send, max_concurrency=options.max_concurrency, on_done=on_done)
    config = {
        "base_url": target.base_url,
        "route": target.route,
        "model": model,
        "num_prompts": len(prompts),
        **dataclasses.asdict(options),
    }
    return ServeResult(config=config, summary=summarize(records), records=records)


async def find_model(client: httpx.AsyncClient) -> str:
    """The first model that the server lists. Raises BenchError with what was tried."""
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise BenchError(
            f"{client.base_url}v1/models answers {error.response.status_code}; give --model, and --api-key if it wants one"
        ) from None
    except httpx.TransportError as error:
        raise BenchError(f"no server answers at {client.base_url}: {error}; start one, or give --url") from None
    except (ValueError, LookupError, TypeError):
        raise BenchError(f"{client.base_url}v1/models lists no model; give --model") from None


async def find_vocab_size(client: httpx.AsyncClient) -> int:
    """The model's, where the server tells it (ours does); else a size that any model has."""
    for path in ("/model_info", "/server_info"):
        try:
            response = await client.get(path)
            facts = response.json() if response.is_success else {}
        except (httpx.TransportError, ValueError):
            continue
        size = facts.get("vocab_size") if isinstance(facts, dict) else None
        if isinstance(size, int):
            return size
    return SAFE_VOCAB


async def _warm_up(send: HttpSender, num_requests: int) -> None:
    prompts = random_ids(num_requests, input_len=WARMUP_INPUT, output_len=WARMUP_OUTPUT, seed=WARMUP_SEED)
    records = [RequestRecord() for _ in prompts]
    await asyncio.gather(*map(send, prompts, records))
    if failed := [record for record in records if not record.ok]:
        raise BenchError(f"the warm-up request failed, so nothing was measured: {failed[0].error}")


async def _flush_cache(client: httpx.AsyncClient) -> None:
    try:
        response = await client.post("/flush_cache")
    except httpx.TransportError as error:
        raise BenchError(f"/flush_cache: {error}") from None
    if not response.is_success:
        raise BenchError(
            f"/flush_cache answers {response.status_code}; drop --flush-cache where the server has no such route"
        )
