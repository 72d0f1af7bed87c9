"""generation_config.json: the sampling defaults that a checkpoint's authors chose, and the ids that end an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sglang_core.weights.checkpoint import read_json

logger = logging.getLogger(__name__)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ids(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


READ: Mapping[str, Callable[[Any], bool]] = {
    "temperature": lambda v: _number(v) and v >= 0,
    "top_p": lambda v: _number(v) and 0 < v <= 1,
    "top_k": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "min_p": lambda v: _number(v) and 0 <= v <= 1,
    "repetition_penalty": lambda v: _number(v) and v > 0,
    "eos_token_id": _ids,
}


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The settings above that generation_config.json has, under its own names; empty without the file.

    A value that makes no sense is left out and logged: it is a default, and no reason not to serve. `top_k` 0 means all
    there and is -1 here. `do_sample` is not read: what a request leaves unsaid is sampled, as everywhere else.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    raw = read_json(path)
    given = {name: raw[name] for name in READ if raw.get(name) is not None}
    wrong = {name: value for name, value in given.items() if not READ[name](value)}
    if wrong:
        logger.warning("%s: ignored %s", path, ", ".join(f"{name}={value!r}" for name, value in wrong.items()))
    settings = {name: value for name, value in given.items() if name not in wrong}
    if settings.get("top_k") == 0:
        settings["top_k"] = -1
    return settings
