"""KV memory that running requests hold: pools that let go of what a window has passed, against full attention.

python benchmarks/kv/window_memory.py [--reqs 8] [--windows 4]

Every request grows to 4 windows, three quarters of it prompt. The scheduler and its prefix tree run for real, pools are counted and
not allocated: what counts is the most bytes that could not be granted to another request at any moment. Bytes a page are those of
the published model's shape in bfloat16. Each model runs twice, as it is and with its windows taken away.
"""

from __future__ import annotations

import argparse
import time

import torch

from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.selection import OpTable
from sglang_core.cache.page_allocator import PageAllocator
from sglang_core.cache.radix import RadixCache
from sglang_core.layers.build import BuildContext, bind_model
from sglang_core.models.registry import model_class
from sglang_core.ops import OPS
from sglang_core.scheduler import Scheduler, SchedulerConfig
from sglang_core.types import Batch, Req, SamplingParams, StepResult

PAGE_SIZE = 16
MODELS = {
    "Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    },
    "gemma-2-9b": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,  # 8,192 as published: two windows
        "sliding_window": 4096,
    },
    "gemma-3-4b": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 1024,
    },
}


def peak_bytes(hf_config: dict, *, windowed: bool, reqs: int, windows: int, chunk: int) -> dict[str, int]:
    """The most bytes of each pool that running requests held at once."""
    specs = pool_specs(hf_config, windowed=windowed)
    length = windows * hf_config["sliding_window"]
    num_pages = 2 * reqs * length // PAGE_SIZE
    config = SchedulerConfig(
        max_running=reqs,
        context_length=length,
        page_size=PAGE_SIZE,
        token_budget=chunk,
        max_in_flight=2,
        output_reserve=0.0,
        groups=tuple(spec.group_spec for spec in specs.values()),
    )
    cache = RadixCache(PAGE_SIZE, config.groups)
    scheduler = Scheduler(config, cache, {g: PageAllocator(num_pages) for g in specs}, time.monotonic)
    for i in range(reqs):
        prompt = [(i * 7919 + p * 104729) % 30000 for p in range(length * 3 // 4)]
        sampling = SamplingParams(max_new_tokens=length, ignore_eos=True)
        scheduler.add_req(Req(rid=str(i), input_ids=prompt, sampling=sampling))
    flight: list[Batch] = []
    peak = dict.fromkeys(specs, 0)
    while scheduler.has_work:
        while (batch := scheduler.schedule()) is not None:
            flight.append(batch)
        done = flight.pop(0)
        for group, spec in specs.items():
            _, available, usable = scheduler.usage(group)
            peak[group] = max(peak[group], (usable - available) * spec.bytes_per_page)
        sample = done.plan.sample
        scheduler.process_results(
            done,
            StepResult(
                step=done.plan.step, token_ids=[[7] if s else [] for s in sample], num_accepted=[int(s) for s in sample]
            ),
        )
    return peak


def pool_specs(hf_config: dict, *, windowed: bool) -> dict:
    found, backend = model_class(hf_config), CpuBackend()
    cfg = found.read_config(hf_config)
    if not windowed:
        cfg = cfg.replace(windows=(None,) * cfg.num_layers)
    with torch.device("meta"):
        model = found(cfg)
    context = BuildContext(
        table=OpTable(backend.probe()[0], backend, ops=OPS, page_size=PAGE_SIZE),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        context_length=1024,
        page_size=PAGE_SIZE,
    )
    bind_model(model, context)
    return model.pool_specs(PAGE_SIZE, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description="KV memory of windowed pools against full attention")
    parser.add_argument("--reqs", type=int, default=8, help="requests that run at once")
    parser.add_argument("--windows", type=int, default=4, help="how long each becomes, in windows")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of prompts that a step computes")
    args = parser.parse_args()
    print(f"{args.reqs} requests of {args.windows} windows, chunks of {args.chunk}, two steps in flight")
    print(
        f"{'model':<16} {'windowed layers':>16} {'as full layers':>15} {'ratio':>6} {'whole model':>12} {'as full':>10} {'ratio':>6}"
    )
    for name, hf_config in MODELS.items():
        mine, full = (
            peak_bytes(hf_config, windowed=w, reqs=args.reqs, windows=args.windows, chunk=args.chunk)
            for w in (True, False)
        )
        specs = pool_specs(hf_config, windowed=True)
        local = sum(size for group, size in mine.items() if specs[group].window is not None)
        whole, whole_full = sum(mine.values()), sum(full.values())
        share = (
            sum(spec.num_layers for spec in specs.values() if spec.window is not None) / hf_config["num_hidden_layers"]
        )
        as_full = whole_full * share
        print(
            f"{name:<16} {local / 2**30:>12.2f} GiB {as_full / 2**30:>11.2f} GiB {local / as_full:>6.3f}"
            f" {whole / 2**30:>8.2f} GiB {whole_full / 2**30:>6.2f} GiB {whole / whole_full:>6.3f}"
        )


if __name__ == "__main__":
    main()
