"""Part `engine`: a whole model of random weights: a step against its floor, the gap between steps, short prefills, throughput, capture,
start-up."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import decode, limits
from benchmarks.gpu.busy import busy_fraction, device_intervals
from benchmarks.gpu.checkpoint import kept_checkpoint
from benchmarks.gpu.opened import Opened
from benchmarks.gpu.session import Case, Facts, Session
from sglang_core import Engine
from sglang_core.bench.offline import run_offline
from sglang_core.bench.step import StepDriver, StepShape, open_rank
from sglang_core.bench.workload import random_ids
from sglang_core.config import EngineConfig
from sglang_core.engine.build import build_engine
from sglang_core.types import AddReq, SamplingParams

CONFIGS = Path(__file__).parents[1] / "configs"
MODEL, SMALL_MODEL = "llama-3.1-8b", "llama-tiny"
LIMITS, OFFLINE = "limits", "offline throughput"
WATCHED_STEPS = 40
# Of a decode step: kernels asked for, and whether they are launched before those ahead of them have ended.
FORMS: dict[str, tuple[tuple[str, ...], bool]] = {
    "plain": ((), False),
    "plain_dependent": ((), True),
    "streamed": (("gemm.linear=streamed",), False),
    "streamed_dependent": (("gemm.linear=streamed",), True),
}


class Sizes:
    """Of the cases. The small ones are for a host, and mean nothing."""

    def __init__(self, *, small: bool) -> None:
        self.model = SMALL_MODEL if small else MODEL
        self.batch, self.input, self.output = (4, 16, 8) if small else (256, 1024, 1024)
        self.context = 64 if small else 1024
        self.prefills = (4, 16) if small else (16, 32, 64, 100, 128, 200, 256, 390, 512)
        self.prefill_models = (SMALL_MODEL,) if small else (MODEL, "qwen3-0.6b")
        self.repeats = 3 if small else 20
        self.their_output = (
            4 if small else 33
        )  # of transformers: its rate is of steps, and does not wait for all of them


def cases(opened: Opened, session: Session, only: str = "") -> Iterator[Case]:
    sizes, device = Sizes(small=opened.small), opened.chosen.info.label
    session.done.pop(LIMITS, None)
    yield Case(LIMITS, partial(limits.measure, opened), first=True)
    listed = [
        Case("decode step, batch 1", partial(decode_step, session, sizes, device), seconds=120),
        Case("decode step, batch 1, other forms", partial(decode_forms, session, opened, sizes, device), seconds=150),
        Case("decode, gap between steps", partial(host_gap, opened, sizes, device), seconds=90, last=True),
        *(
            Case(f"short prefills, {model}", partial(short_prefills, opened, sizes, device, model), seconds=90)
            for model in sizes.prefill_models
        ),
        Case(OFFLINE, partial(offline, sizes, device), seconds=120),
        Case("transformers", partial(transformers_rate, opened, session, sizes), seconds=150),
        Case("capture of all buckets", partial(capture, sizes, device), seconds=90),
        Case("ready from local weights", partial(ready, sizes, device), seconds=100),
    ]
    yield from (case for case in listed if only in case.name)


def checkpoint_of(model: str) -> Path:
    return kept_checkpoint(CONFIGS / f"{model}.json")


def settings(model: str, sizes: Sizes, device: str, **more: Any) -> dict[str, Any]:
    base = {
        "model_path": str(checkpoint_of(model)),
        "device": device,
        "dtype": "bfloat16",
        "load_format": "safetensors",
        "skip_tokenizer_init": True,
        "context_length": sizes.input + sizes.output + sizes.context,
        "disable_radix_cache": True,
        "max_running_requests": sizes.batch,
        "max_total_tokens": sizes.batch * (sizes.input + sizes.output + 64),
    }
    return base | more


def decode_step(session: Session, sizes: Sizes, device: str) -> Facts:
    """From plan to token on the host, against reading every weight but the embedding once."""
    took = decode.measured(single(sizes, device), sizes.context, sizes.repeats)
    floor = took["nbytes"] / session.done[LIMITS]["copy"]
    return {
        "reached": floor / took["seconds"],
        "target": 0.8,
        "ms": 1e3 * took["seconds"],
        "floor_ms": 1e3 * floor,
        "nbytes": took["nbytes"],
    }


def decode_forms(session: Session, opened: Opened, sizes: Sizes, device: str) -> Facts:
    """The same step with what nobody takes unasked. How kernels are launched changes no bit of a result, so no token."""
    facts: Facts = {}
    tokens = {}
    for form, (kernel, dependent) in (FORMS if opened.on_gpu else {"plain": FORMS["plain"]}).items():
        given = single(sizes, device) | {"kernel": kernel}
        took = decode.in_process_of_its_own(given, sizes.context, sizes.repeats, dependent=dependent)
        facts[f"{form}_ms"] = 1e3 * took["seconds"]
        facts[f"{form}_reached"] = took["nbytes"] / session.done[LIMITS]["copy"] / took["seconds"]
        tokens[form] = took["tokens"]
        if dependent:
            pairs = zip(tokens[form], tokens[form.removesuffix("_dependent")], strict=True)
            facts[f"{form}_tokens_differ"] = sum(a != b for a, b in pairs)
    return facts


def single(sizes: Sizes, device: str) -> dict[str, Any]:
    return settings(sizes.model, sizes, device, max_running_requests=1, max_total_tokens=None)


def host_gap(opened: Opened, sizes: Sizes, device: str) -> Facts:
    """Full decode steps of the engine itself, in this process, under a profiler that sees the device alone."""
    core = build_engine(
        EngineConfig.from_flat(**settings(sizes.model, sizes, device)), world_size=1, directory=None, progress=False
    )
    try:
        vocab = int(core.info["vocab_size"])  # type: ignore[call-overload]
        prompts = random_ids(sizes.batch, input_len=sizes.input, output_len=1, vocab_size=vocab, seed=0)
        greedy = SamplingParams(temperature=0.0, max_new_tokens=sizes.output, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            core.handle(AddReq(rid=str(i), input_ids=list(prompt.input_ids or ()), sampling=greedy))
        decoding: set[str] = set()
        while len(decoding) < sizes.batch:  # every prompt is in
            decoding |= {output.rid for output in core.step() if output.token_ids}
        steps = min(WATCHED_STEPS, sizes.output - 6)

        def watched() -> float:
            started, count = time.perf_counter(), 0
            while count < steps * sizes.batch and core.has_work:
                count += sum(len(output.token_ids) for output in core.step())
            return (time.perf_counter() - started) / max(1, count // sizes.batch)

        seconds = watched() if not opened.on_gpu else 0.0
        facts: Facts = {"target": 0.98, "steps": steps, "batch": sizes.batch}
        if opened.on_gpu:
            took: list[float] = []
            facts["reached"] = busy_fraction(device_intervals(lambda: took.append(watched())))
            (seconds,) = took
        return facts | {"ms": 1e3 * seconds}
    finally:
        core.runner.close()


def short_prefills(opened: Opened, sizes: Sizes, device: str, model: str) -> Facts:
    """One prompt a step, from plan to token on the host: as a graph of its bucket, and kernel by kernel."""
    shapes = [StepShape.prefill(1, length) for length in sizes.prefills]
    graphs = max(sizes.prefills) if opened.runtime.captures_prefills else 0
    facts: Facts = {"captured": graphs}
    for form, tokens in (("graph", graphs), ("eager", 0)):
        opened.release()
        given = settings(model, sizes, device, max_total_tokens=None, prefill_graph_tokens=tokens)
        rank = open_rank(EngineConfig.from_flat(**given), shapes)
        try:
            rank.runner.warm_up(progress=False)
            driver = StepDriver.of(rank)
            for shape in shapes:
                facts[f"{form}_{shape.num_tokens}_ms"] = 1e3 * driver.measure(shape, sizes.repeats).median
        finally:
            rank.runner.close()
            rank.runtime.close()
        del rank, driver
    return facts | {f"gain_{n}": facts[f"eager_{n}_ms"] / facts[f"graph_{n}_ms"] for n in sizes.prefills}


def offline(sizes: Sizes, device: str) -> Facts:
    """All requests at once, to their full length."""
    with Engine(**settings(sizes.model, sizes, device)) as engine:
        prompts = random_ids(
            sizes.batch, input_len=sizes.input, output_len=sizes.output, vocab_size=engine.info.vocab_size, seed=0
        )
        short = random_ids(sizes.batch, input_len=sizes.input, output_len=2, vocab_size=engine.info.vocab_size, seed=1)
        run_offline(engine, short)
        found = run_offline(engine, prompts)
    return {
        "output_tokens_per_s": found.output_per_s,
        "total_tokens_per_s": found.total_per_s,
        "seconds": found.seconds,
        "requests": found.num_requests,
    }


def transformers_rate(opened: Opened, session: Session, sizes: Sizes) -> Facts:
    """`generate`, greedy, bfloat16, SDPA, the same batch and prompts' length: the rate of its steps, its prefill not counted."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint_of(sizes.model))
    with torch.device(opened.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(config.vocab_size, (sizes.batch, sizes.input)).to(opened.device)
    seconds = []
    for count in (1, 1, sizes.their_output):
        opened.runtime.synchronize()
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        opened.runtime.synchronize()
        seconds.append(time.perf_counter() - started)
    rate = sizes.batch * (sizes.their_output - 1) / max(seconds[2] - seconds[1], 1e-9)
    facts: Facts = {"output_tokens_per_s": rate, "batch": sizes.batch}
    if ours := session.done.get(OFFLINE):  # with its prefill, and contexts twice as long in the mean
        facts["ours_over_theirs"] = ours["output_tokens_per_s"] / rate
        facts["at_least"] = 10.0
    return facts


def capture(sizes: Sizes, device: str) -> Facts:
    """Every bucket: decode steps, steps with prefills, and sampling."""
    shape = StepShape.decode(sizes.batch, sizes.context)
    given = settings(sizes.model, sizes, device, max_total_tokens=None)
    rank = open_rank(EngineConfig.from_flat(**given), [shape])
    try:
        started = time.perf_counter()
        rank.runner.warm_up(progress=False)
        seconds = time.perf_counter() - started
    finally:
        rank.runner.close()
        rank.runtime.close()
    return {"seconds": seconds, "most": 15.0}


def ready(sizes: Sizes, device: str) -> Facts:
    """A new process, from its start to the moment it would answer, with weights in files that were read or written before: the host has them cached."""
    code = "import json, sys; from sglang_core import Engine; Engine(**json.loads(sys.argv[1])).shutdown()"
    given = settings(sizes.model, sizes, device)
    nbytes = sum(path.stat().st_size for path in checkpoint_of(sizes.model).glob("*.safetensors"))
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, json.dumps(given)], check=True, timeout=100)
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median_low(seconds), "most": 30.0, "nbytes": nbytes}
