"""What every engine is asked, row by row of the table. A round's ids are its own, so that no cache helps unless the row is about one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from peer_engines.engines import LLAMA_CPP, OURS, OWN_VARIANTS, TRANSFORMERS, VLLM
from sglang_core.bench.workload import Prompt, random_ids, shared_prefix

ALL = (OURS, VLLM, LLAMA_CPP, TRANSFORMERS)
SERVERS = (OURS, VLLM)  # the ones that schedule requests of different lengths
DECODE_INPUT, DECODE_OUTPUT = 128, 33
PREFIX, SUFFIX, PREFIX_OUTPUT, PREFIX_REQS = 1024, 32, 16, 32
MIXED_REQS, MIXED_INPUT, MIXED_OUTPUT = 64, (128, 512), (32, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """`prompts(seed)` are asked at once. A decode row asks twice, for one token and for all, and counts what lies between.

    `target` is what our median ratio to the best peer must reach.
    """

    name: str
    unit: str
    prompts: Callable[[int], list[Prompt]]
    engines: tuple[str, ...]
    target: float
    decode: bool = False
    cache: bool = False
    counts_prompt: bool = False  # tokens/s of the prompt's tokens, not of the answer's


def decode(batch: int, target: float, vocab_size: int, engines: tuple[str, ...] = ALL) -> Workload:
    return Workload(
        name=f"decode, batch {batch}",
        unit="tokens/s",
        prompts=lambda seed: random_ids(
            batch, input_len=DECODE_INPUT, output_len=DECODE_OUTPUT, vocab_size=vocab_size, seed=seed
        ),
        engines=engines,
        target=target,
        decode=True,
    )


def prefill(count: int, length: int, vocab_size: int) -> Workload:
    return Workload(
        name=f"prefill, {count} x {length}",
        unit="prompt tokens/s",
        prompts=lambda seed: random_ids(count, input_len=length, output_len=1, vocab_size=vocab_size, seed=seed),
        engines=ALL,
        target=2.0,
        counts_prompt=True,
    )


def mixed(vocab_size: int) -> Workload:
    def prompts(seed: int) -> list[Prompt]:
        rng = random.Random(seed)
        return [
            Prompt(
                input_ids=rng.choices(range(vocab_size), k=rng.randint(*MIXED_INPUT)),
                output_len=rng.randint(*MIXED_OUTPUT),
            )
            for _ in range(MIXED_REQS)
        ]

    return Workload(name="64 mixed requests", unit="output tokens/s", prompts=prompts, engines=SERVERS, target=1.6)


def prefix(vocab_size: int) -> Workload:
    return Workload(
        name="shared prefix, cache on",
        unit="output tokens/s",
        prompts=lambda seed: shared_prefix(
            PREFIX_REQS,
            groups=1,
            prefix_len=PREFIX,
            suffix_len=SUFFIX,
            output_len=PREFIX_OUTPUT,
            vocab_size=vocab_size,
            seed=seed,
        ),
        engines=SERVERS,
        target=1.5,
        cache=True,
    )


def workloads(shape: str, vocab_size: int, *, quick: bool) -> list[Workload]:
    """The rows of a shape, in the table's order."""
    if "moe" in shape:
        return [decode(batch, target, vocab_size) for batch, target in ((1, 1.3), (8, 1.5), (32, 1.5))]
    if quick:
        return [decode(1, 1.4, vocab_size), decode(8, 1.5, vocab_size), prefill(1, 512, vocab_size)]
    return [
        decode(1, 1.4, vocab_size, (*ALL, *OWN_VARIANTS)),
        decode(8, 1.5, vocab_size),
        decode(32, 2.0, vocab_size),
        prefill(1, 2048, vocab_size),
        prefill(8, 512, vocab_size),
        mixed(vocab_size),
        prefix(vocab_size),
    ]
