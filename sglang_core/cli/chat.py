"""`sglang-core chat`: a conversation in the terminal. Ctrl-C stops an answer, Ctrl-D or /exit ends the chat."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from sglang_core.cli.parser import Parser, did_you_mean
from sglang_core.cli.sampling_flags import add_sampling, given_sampling
from sglang_core.cli.settings import WHICH_MODEL, add_settings, engine_config
from sglang_core.errors import EngineDeadError, SglangError

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_core.cli.talkers import Message, Talker

COMMANDS = {
    "/reset": "forget the conversation",
    "/system TEXT": "set the system message and forget the conversation",
    "/help": "this list",
    "/exit": "end the chat (or Ctrl-D)",
}


def run(argv: list[str]) -> int:
    parser = Parser(
        "chat",
        "(--model-path MODEL | --url URL) [options]",
        "Talk to a model in the terminal, on a server or on an engine of this command's own.",
        argv,
        epilog="example: sglang-core chat --model-path demo",
    )
    parser.options.add_argument("--url", help="an OpenAI-compatible server to talk to, instead of --model-path")
    parser.options.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling(parser)
    add_settings(parser, shown=(*WHICH_MODEL, "api_key"))
    args = parser.parse()
    from rich.console import Console

    from sglang_core.cli.talkers import EngineTalker, HttpTalker

    console = Console(highlight=False)
    sampling: dict[str, Any] = given_sampling(args)
    with asyncio.Runner() as runner:
        talker: Talker
        if args.url:
            talker = runner.run(HttpTalker.connect(args.url, getattr(args, "api_key", None), sampling))
        else:
            config = engine_config(args, log_level="error")
            with console.status(f"loading {config.model.model_path}"):
                talker = runner.run(EngineTalker.start(config, sampling))
        try:
            converse(talker, runner.run, console, system=args.system)
        finally:
            runner.run(talker.close())
    return 0


def converse(talker: Talker, run_async: Callable[..., Any], console: Console, *, system: str | None = None) -> None:
    """Read a line, answer it, until there is no more. Errors of one turn are shown and end only that turn."""
    console.print(f"[bold]{talker.name}[/bold]  [dim]/help for commands[/dim]")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    chat = Conversation(system)
    while (line := _read_line(console)) is not None:
        if line.startswith("/"):
            if not _obey(line, chat, console):
                return
        elif line:
            _take_turn(line, chat, talker, run_async, console)


class Conversation:
    """The messages so far."""

    def __init__(self, system: str | None = None) -> None:
        self.reset(system)

    def reset(self, system: str | None) -> None:
        self.system = system
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def say(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})


def _read_line(console: Console) -> str | None:
    """None at the end of input."""
    try:
        return console.input("[bold green]>[/bold green] " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _obey(line: str, chat: Conversation, console: Console) -> bool:
    """Run a /command; False ends the chat."""
    word, _, rest = line.partition(" ")
    if word in ("/exit", "/quit"):
        return False
    if word == "/reset":
        chat.reset(chat.system)
        console.print("[dim]forgotten[/dim]")
    elif word == "/system":
        chat.reset(rest.strip() or None)
        console.print("[dim]system message set[/dim]" if chat.system else "[dim]no system message[/dim]")
    elif word == "/help":
        for name, text in COMMANDS.items():
            console.print(f"  {name:<14} {text}", style="dim")
    else:
        known = [name.split()[0] for name in COMMANDS]
        console.print(
            f"unknown command {word}{did_you_mean(word, known) or '; see /help'}", style="yellow", markup=False
        )
    return True


def _take_turn(line: str, chat: Conversation, talker: Talker, run_async: Callable[..., Any], console: Console) -> None:
    chat.say("user", line)
    pieces: list[str] = []
    started = time.perf_counter()
    try:
        run_async(_print_answer(talker, chat.messages, pieces, console))
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    except EngineDeadError:
        raise
    except SglangError as error:
        console.print(str(error), style="red", markup=False)
        chat.messages.pop()
        return
    seconds = time.perf_counter() - started
    console.print(f"\n[dim]{seconds:.1f} s[/dim]")
    chat.say("assistant", "".join(pieces))


async def _print_answer(talker: Talker, messages: list[Message], pieces: list[str], console: Console) -> None:
    """Print the answer as it comes; `pieces` holds what came, also when stopped."""
    async with aclosing(talker.answer(messages)) as answer:
        async for text in answer:
            pieces.append(text)
            console.print(text, end="", markup=False, soft_wrap=True)
