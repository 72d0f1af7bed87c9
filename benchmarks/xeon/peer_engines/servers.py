"""HTTP servers under a Poisson load: how long until they are ready, and the gaps between a stream's tokens."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_engines.child import ChildError
from peer_engines.engines import CONTEXT, KV_TOKENS, MAX_REQS, OURS, VLLM, Place, environment
from sglang_core.bench.serve import LoadOptions, Target, open_client, run_serve
from sglang_core.bench.workload import random_ids

READY = 600.0  # seconds a server may take
MODEL = "peer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Requests at Poisson times, the same times and ids for every server."""

    rate: float = 4.0
    num_requests: int = 120
    input_len: int = 128
    output_len: int = 32


def measure(engine: str, folder: Path, place: Place, load: Load, vocab_size: int) -> dict[str, Any]:
    """-> seconds until ready, and the run's latencies in ms. Raises ChildError."""
    with _server(engine, folder, place) as (url, ready):
        prompts = random_ids(
            load.num_requests, input_len=load.input_len, output_len=load.output_len, vocab_size=vocab_size, seed=1
        )
        summary = asyncio.run(_load(url, prompts, load.rate))
    if summary.failed or summary.itl is None or summary.ttft is None:
        raise ChildError(f"{engine}: {summary.failed} of {load.num_requests} requests failed: {summary.errors}")
    return {
        "ready_s": ready,
        "itl_p50_ms": summary.itl.p50,
        "itl_p99_ms": summary.itl.p99,
        "ttft_p50_ms": summary.ttft.p50,
        "ttft_p99_ms": summary.ttft.p99,
        "output_tokens_per_s": summary.output_throughput,
        "ended_early": summary.ended_early,
    }


async def _load(url: str, prompts: Any, rate: float) -> Any:
    target = Target(base_url=url, route="completions", model=MODEL)
    async with open_client(target) as client:
        options = LoadOptions(request_rate=rate, extra_body={"ignore_eos": True}, num_warmup=2)
        return (await run_serve(client, target, prompts, options)).summary


@contextmanager
def _server(engine: str, folder: Path, place: Place) -> Iterator[tuple[str, float]]:
    """-> (its URL, seconds until it answered its health probe)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = place.work / f"serve-{engine}.log"
    started = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(
            _command(engine, folder, place, port),
            env=environment(engine, place),
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.perf_counter() - started > READY:
                raise ChildError(f"the server of {engine} does not come up; its log is {log}")
            time.sleep(0.1)
        yield url, time.perf_counter() - started
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _command(engine: str, folder: Path, place: Place, port: int) -> list[str]:
    common = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16", "--served-model-name", MODEL]
    if engine == OURS:
        ours = ["--model-path", str(folder), "--device", "xeon", "--num-threads", str(place.threads)]
        room = ["--context-length", str(CONTEXT), "--max-total-tokens", str(KV_TOKENS)]
        room += ["--max-running-requests", str(MAX_REQS)]
        return [sys.executable, "-m", "sglang_core", "serve", *ours, *room, *common]
    assert engine == VLLM, f"{engine} has no server here"
    theirs = ["--model", str(folder), "--max-model-len", str(CONTEXT), "--max-num-seqs", str(MAX_REQS)]
    theirs += ["--enforce-eager"] if place.eager else []
    return [str(place.python(engine)), "-m", "vllm.entrypoints.openai.api_server", *theirs, *common]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
