"""The `sglang-core` command: finds the subcommand and imports only that one, so that help and version stay instant."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from sglang_core import __version__
from sglang_core.errors import ConfigError, SglangError

COMMANDS = {
    "serve": "start the HTTP server",
    "generate": "answer prompts once, without a server",
    "chat": "talk to a model in the terminal",
    "bench": "measure a server, the engine or single steps",
    "devices": "list installed backends and the devices they find",
    "explain": "show which kernel each op of a model got on a device, and why",
    "profile": "rank the ops of a model by the time they take on a device",
    "tune": "find the fastest configs of a kernel, or the fastest provider of an op, for the shapes of a model",
    "doctor": "check this environment and say how to fix it",
    "version": "show versions of the core, the plugins and what they stand on",
}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status: 0 fine, 1 failed, 2 wrong usage."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if args else EXIT_USAGE
    if args[0] in ("-V", "--version"):
        print(f"sglang-core {__version__}")
        return 0
    try:
        return _dispatch(args[0], args[1:])
    except SglangError as error:
        where = f"sglang-core {args[0]}" if args[0] in COMMANDS else "sglang-core"
        print(f"{where}: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(command: str, args: list[str]) -> int:
    if command not in COMMANDS:
        from sglang_core.cli.parser import did_you_mean

        hint = did_you_mean(command, COMMANDS) or f"; it is one of {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {command!r}{hint}")
    status: int = importlib.import_module(f"sglang_core.cli.{command}").run(args)
    return status


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sglang-core COMMAND [options]",
            "",
            "SGLang as a plugin framework: one engine, and a plugin for each kind of device.",
            "",
            "commands:",
            *lines,
            "",
            "options:",
            "  -h, --help     this text; `sglang-core COMMAND --help` for a command",
            "  -V, --version  the version",
            "",
            "try: sglang-core serve --model-path demo",
        ]
    )
