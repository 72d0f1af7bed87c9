"""Flags that say how tokens are picked, for `generate` and `chat`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sglang_core.cli.parser import Parser
from sglang_core.errors import ConfigError, RequestError

FLAGS: tuple[tuple[str, type, str], ...] = (
    ("--max-new-tokens", int, "tokens to generate at most"),
    ("--temperature", float, "0 is greedy"),
    ("--top-p", float, "smallest set of tokens with this probability together"),
    ("--top-k", int, "only the k likeliest tokens; -1 means all"),
    ("--min-p", float, "only tokens at least this likely, relative to the likeliest"),
    ("--repetition-penalty", float, "above 1 it discourages tokens that have occurred"),
    ("--frequency-penalty", float, "taken from a token's logit each time it has occurred"),
    ("--presence-penalty", float, "taken from a token's logit once it has occurred"),
    ("--seed", int, "same seed, same answer"),
)
MODEL_SAYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def add_sampling(parser: Parser) -> None:
    """Add the flags; what is not given is the model's own default."""
    group = parser.add_argument_group("sampling (unsaid: the model's defaults)")
    for name, kind, text in FLAGS:
        group.add_argument(name, type=kind, metavar="N" if kind is int else "X", default=argparse.SUPPRESS, help=text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", default=argparse.SUPPRESS, help="end here; repeatable"
    )
    group.add_argument("--ignore-eos", action="store_true", default=argparse.SUPPRESS, help="go on to --max-new-tokens")


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling fields that the command line sets, by SGLang's names. Raises ConfigError on one out of bounds."""
    from sglang_core.engine.native import parse_sampling_params

    names = [*(name[2:].replace("-", "_") for name, _, _ in FLAGS), "stop", "ignore_eos"]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    try:
        parse_sampling_params(given)
    except RequestError as error:
        raise ConfigError(str(error)) from None
    return given


def with_model_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is not given comes from the model's generation_config.json, as the server does it."""
    return {name: defaults[name] for name in MODEL_SAYS if defaults.get(name) is not None} | dict(given)
