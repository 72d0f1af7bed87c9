"""`sglang-core generate`: answer prompts once, with an engine that lives for this command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang_core.cli.parser import Parser, print_json
from sglang_core.cli.sampling_flags import add_sampling, given_sampling, with_model_defaults
from sglang_core.cli.settings import WHICH_MODEL, add_settings, engine_config
from sglang_core.errors import ConfigError

if TYPE_CHECKING:
    from sglang_core import Engine


def run(argv: list[str]) -> int:
    parser = Parser(
        "generate",
        "--model-path MODEL [PROMPT ...] [options]",
        "Continue prompts, given as arguments or on stdin, without a server.",
        argv,
        epilog='example: sglang-core generate --model-path demo --chat --temperature 0 "What is the capital of France?"',
    )
    parser.options.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue; stdin if none is given")
    parser.options.add_argument(
        "--chat", action="store_true", help="ask each prompt as a user's message, with the chat template"
    )
    parser.options.add_argument("--lines", action="store_true", help="each line of stdin is a prompt of its own")
    parser.options.add_argument("--json", action="store_true", help="print JSON: prompt, text, output_ids, meta_info")
    add_sampling(parser)
    add_settings(parser, shown=WHICH_MODEL)
    args = parser.parse()
    config, given = engine_config(args, log_level="error"), given_sampling(args)
    prompts = args.prompts or _from_stdin(args.lines)
    from sglang_core import Engine  # imports torch

    with Engine(**config.flat()) as engine:
        asked = _chat_ids(engine, prompts) if args.chat else {"prompt": list(prompts)}
        sampling = with_model_defaults(given, engine.info.generation_defaults)
        if len(prompts) == 1 and not args.json:
            _print_stream(engine, {name: values[0] for name, values in asked.items()}, sampling)
        else:
            _print_results(prompts, engine.generate(**asked, sampling_params=sampling), args.json)
    return 0


def _from_stdin(by_line: bool) -> list[str]:
    if sys.stdin.isatty():
        raise ConfigError("no prompt: give one as an argument, or on stdin")
    text = sys.stdin.read().rstrip("\n")
    prompts = [line for line in text.splitlines() if line] if by_line else [text]
    if not any(prompts):
        raise ConfigError("no prompt: stdin is empty")
    return prompts


def _chat_ids(engine: Engine, prompts: Sequence[str]) -> dict[str, list[list[int]]]:
    tokenizer = engine.client.tokenizer
    if tokenizer is None:
        raise ConfigError("--chat needs the tokenizer; drop --skip-tokenizer-init")
    return {"input_ids": [tokenizer.chat_ids([{"role": "user", "content": prompt}]) for prompt in prompts]}


def _print_stream(engine: Engine, asked: dict[str, Any], sampling: dict[str, Any]) -> None:
    shown = 0
    for chunk in engine.generate(**asked, sampling_params=sampling, stream=True):
        text = chunk["text"]
        print(text[shown:], end="", flush=True)
        shown = len(text)
    print()


def _print_results(prompts: Sequence[str], results: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json([{"prompt": prompt, **result} for prompt, result in zip(prompts, results, strict=True)])
        return
    for prompt, result in zip(prompts, results, strict=True):
        print(f"=== {prompt}\n{result['text'].strip()}")
