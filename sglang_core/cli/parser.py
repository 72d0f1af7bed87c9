"""An argument parser that explains: nearest names for typos, SGLang's flags by name, short help and full help."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from sglang_core.errors import ConfigError

HELP_COLUMN, HELP_WIDTH = 34, 120


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """'; did you mean ...?' naming what is closest to `word`, or ''. `prefix` is put before the name."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Names every alias once: `--tp-size, --tp N` and not `--tp-size N, --tp N`."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_COLUMN, width=HELP_WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class Parser(argparse.ArgumentParser):
    """argparse that raises ConfigError and has `--help-all`.

    Flags added while `shows_all` is false may be hidden with `help=self.maybe(text, shown)`.
    """

    def __init__(self, command: str, usage: str, description: str, argv: Sequence[str], epilog: str = "") -> None:
        prog = f"sglang-core {command}"
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}",
            description=description,
            epilog=epilog or None,
            formatter_class=Formatter,
            allow_abbrev=False,
            add_help=False,
        )
        self.argv = list(argv)
        self.shows_all = "--help-all" in self.argv
        self.options = self.add_argument_group("options")
        self.options.add_argument("-h", "--help", action="help", help="this text")
        self.has_more = False

    def maybe(self, text: str, shown: bool) -> str:
        """The help text, or what hides the flag outside `--help-all`."""
        self.has_more |= not shown
        return text.replace("%", "%%") if shown or self.shows_all else argparse.SUPPRESS

    def parse(self) -> argparse.Namespace:
        """Parse the whole command line. Raises ConfigError; prints help and exits where that was asked."""
        if self.has_more:
            self.options.add_argument("--help-all", action="help", help="this text with every flag")
        known, extras = self.parse_known_args(self.argv)
        if extras:
            raise ConfigError(self._explain(extras))
        return known

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))

    def _explain(self, extras: list[str]) -> str:
        flag = next((arg for arg in extras if arg.startswith("-")), None)
        if flag is None:
            takes_model = any("--model-path" in action.option_strings for action in self._actions)
            hint = f"; did you mean --model-path {extras[0]}?" if takes_model else ""
            return f"unexpected argument {extras[0]!r}{hint}"
        from sglang_core.cli.sglang_flags import why_unsupported

        name = flag.split("=")[0]
        if reason := why_unsupported(name):
            return reason
        known = [option for action in self._actions for option in action.option_strings]
        hint = did_you_mean(name.replace("_", "-"), known)
        return f"unknown flag {name}{hint or f'; see {self.prog} --help' + ('-all' if self.has_more else '')}"


def print_json(value: Any) -> None:
    """One JSON document on stdout, for other programs."""
    import json

    json.dump(value, sys.stdout, indent=2, default=str)
    print()
