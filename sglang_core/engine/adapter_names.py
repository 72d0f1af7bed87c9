"""The names of adapters: what they may be, where they come from, and what is said about one that nobody knows."""

from __future__ import annotations

import re
from collections.abc import Iterable

from sglang_core.errors import ConfigError, RequestError
from sglang_core.types import AdapterSource

NAME = re.compile(r"[\w.][\w./-]{0,127}")  # goes into model names, so no ":"; and into cache keys, so no "@"


def check_adapter_name(name: str) -> None:
    """Raises RequestError with what is allowed."""
    if not NAME.fullmatch(name):
        raise RequestError(
            f"lora_name={name!r} must be 1 to 128 letters, digits, '_', '.', '-' or '/'",
            param="lora_name",
            code="invalid_value",
        )


def parse_lora_paths(entries: Iterable[str]) -> list[AdapterSource]:
    """`name=path`, or a path whose last part is the name. Raises ConfigError for bad and repeated names."""
    sources: dict[str, AdapterSource] = {}
    for entry in entries:
        name, is_named, path = entry.partition("=")
        if not is_named:
            name, path = re.split(r"[/:]", entry.rstrip("/"))[-1], entry
        if not path or not NAME.fullmatch(name):
            raise ConfigError(
                f"lora_paths={entry!r} must be NAME=PATH, the name of letters, digits, '_', '.', '-' or '/'"
            )
        if name in sources:
            raise ConfigError(f"lora_paths={entry!r}: {name!r} is given twice; give another name with NAME=PATH")
        sources[name] = AdapterSource(name=name, path=path)
    return list(sources.values())


def unknown_adapter(name: str, known: Iterable[str]) -> RequestError:
    """For a request whose `lora_path` names an adapter that is not served; lists those that are."""
    served = ", ".join(sorted(known)) or "none"
    return RequestError(
        f"LoRA adapter {name!r} is not loaded; loaded: {served}", param="lora_path", code="adapter_not_found"
    )
