"""Flags that describe a workload, for `bench serve` and `bench offline`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sglang_core.cli.parser import Parser
from sglang_core.errors import ConfigError

if TYPE_CHECKING:
    from sglang_core.bench.workload import Prompt

DATASETS = ("random-ids", "shared-prefix", "file")


def add_workload(parser: Parser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--dataset", choices=DATASETS, default="random-ids", help="kind of prompts (default: random-ids)"
    )
    group.add_argument(
        "--dataset-path", metavar="FILE", help="for file: JSON lines with prompt and output_len, or ShareGPT"
    )
    add = _number_flags(group)
    add("--num-prompts", 100, "requests to make")
    add("--input-len", 512, "random-ids: tokens of a prompt")
    add("--output-len", 64, "tokens to generate")
    add("--range-ratio", 1.0, "random-ids: shortest length as a share of the longest")
    add("--num-groups", 1, "shared-prefix: families of prompts")
    add("--prefix-len", 1024, "shared-prefix: tokens that a family has in common")
    add("--suffix-len", 32, "shared-prefix: tokens of each prompt's own")
    add("--seed", 0, "same seed, same prompts and arrivals")
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="ids are drawn below it (default: the model's, else 1000)"
    )


class _number_flags:
    """Adds a flag whose type is its default's."""

    def __init__(self, group: argparse._ArgumentGroup) -> None:
        self._group = group

    def __call__(self, name: str, default: int | float, text: str) -> None:
        kind = type(default)
        self._group.add_argument(
            name, type=kind, default=default, metavar="N" if kind is int else "X", help=f"{text} (default: {default})"
        )


def build_prompts(args: argparse.Namespace, vocab_size: int) -> list[Prompt]:
    """The prompts that the flags describe. Raises ConfigError on numbers that describe none."""
    from sglang_core.bench.workload import from_file, random_ids, shared_prefix

    for name in ("num_prompts", "input_len", "output_len", "num_groups", "prefix_len", "suffix_len"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    if not 0 < args.range_ratio <= 1:
        raise ConfigError(f"--range-ratio {args.range_ratio} must be above 0 and at most 1")
    vocab_size = args.vocab_size or vocab_size
    if args.dataset == "shared-prefix":
        return shared_prefix(
            args.num_prompts,
            groups=args.num_groups,
            prefix_len=args.prefix_len,
            suffix_len=args.suffix_len,
            output_len=args.output_len,
            vocab_size=vocab_size,
            seed=args.seed,
        )
    if args.dataset == "file":
        if not args.dataset_path:
            raise ConfigError("--dataset file needs --dataset-path FILE")
        return from_file(args.dataset_path, args.num_prompts, output_len=args.output_len, seed=args.seed)
    return random_ids(
        args.num_prompts,
        input_len=args.input_len,
        output_len=args.output_len,
        range_ratio=args.range_ratio,
        vocab_size=vocab_size,
        seed=args.seed,
    )
