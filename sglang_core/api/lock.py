"""The signature lock: every public name of the plugin API in text, so that no change of it is an accident.

`python -m sglang_core.api.lock` says what differs from `signatures.lock`; with `--write` it takes the change over.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCK = Path(__file__).with_name("signatures.lock")
MODULES = ("sglang_core.api", "sglang_core.api.ops", "sglang_core.api.models")


def render() -> str:
    """The whole API as it is now, one fact a line, in a fixed order."""
    lines: list[str] = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        lines.append(f"[{module_name}]")
        for name in sorted(module.__all__):
            lines += [f"{name}{line}" for line in _describe(getattr(module, name))]
        lines.append("")
    lines.append("[ops]")
    ops = importlib.import_module("sglang_core.ops").OPS
    lines += [f"{name}{signature(ops[name].body)}" for name in sorted(ops)]
    return "\n".join(lines) + "\n"


def differences() -> list[str]:
    """Lines that the lock file and the code do not share, as a diff; empty where they agree."""
    locked = LOCK.read_text() if LOCK.exists() else ""
    diff = difflib.unified_diff(locked.splitlines(), render().splitlines(), "signatures.lock", "code", lineterm="", n=0)
    return [line for line in diff if not line.startswith("@@")]


def _describe(value: Any) -> Iterator[str]:
    if isinstance(value, type) and issubclass(value, enum.Enum):
        yield f": enum {', '.join(f'{member.name}={member.value!r}' for member in value)}"
    elif isinstance(value, type):
        yield from _describe_class(value)
    elif callable(value) and hasattr(value, "__code__"):
        yield signature(value)
    elif isinstance(value, str):
        yield f" = {value!r}"
    else:
        yield f": {type(value).__name__}"


def _describe_class(cls: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    yield f": class({bases})"
    if any(base.__name__ == "Layer" for base in cls.__mro__[1:]):  # used by model files, not derived from
        yield from (f".{name}{signature(getattr(cls, name))}" for name in ("__init__", "forward"))
        return
    if dataclasses.is_dataclass(cls):
        for f in dataclasses.fields(cls):
            yield f".{f.name}: {_annotation(f.type)}{_default(f)}"
    else:
        for name, annotation in sorted(inspect.get_annotations(cls).items()):
            if not name.startswith("_"):
                yield f".{name}: {_annotation(annotation)}"
        if "__init__" in vars(cls) and not getattr(cls, "_is_protocol", False):
            yield f".__init__{signature(vars(cls)['__init__'])}"
    for name, member in sorted(vars(cls).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            assert member.fget is not None
            yield f".{name}: property{signature(member.fget)}"
        elif isinstance(member, (classmethod, staticmethod)):
            yield f".{name}: {type(member).__name__}{signature(member.__func__)}"
        elif inspect.isfunction(member):
            yield f".{name}{signature(member)}{' abstract' if name in getattr(cls, '__abstractmethods__', ()) else ''}"


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is not dataclasses.MISSING:
        return f" = {f.default!r}"
    return (
        f" = {getattr(f.default_factory, '__name__', '...')}()" if f.default_factory is not dataclasses.MISSING else ""
    )


def signature(function: Any) -> str:
    """Like inspect.signature, with annotations as they are written, the same on every Python."""
    signature = inspect.signature(function)
    parts: list[str] = []
    seen_star = False
    for p in signature.parameters.values():
        if inspect.isfunction(p.default):
            continue  # a part of a composite op: a kernel has no such parameter
        if p.kind is p.KEYWORD_ONLY and not seen_star:
            parts.append("*")
            seen_star = True
        star = "*" if p.kind is p.VAR_POSITIONAL else "**" if p.kind is p.VAR_KEYWORD else ""
        seen_star = seen_star or p.kind is p.VAR_POSITIONAL
        annotation = "" if p.annotation is p.empty else f": {_annotation(p.annotation)}"
        default = "" if p.default is p.empty else f" = {p.default!r}"
        parts.append(f"{star}{p.name}{annotation}{default}")
        if p.kind is p.POSITIONAL_ONLY and _last_positional_only(signature, p):
            parts.append("/")
    result = "" if signature.return_annotation is signature.empty else f" -> {_annotation(signature.return_annotation)}"
    return f"({', '.join(parts)}){result}"


def _last_positional_only(signature: inspect.Signature, p: inspect.Parameter) -> bool:
    return [q for q in signature.parameters.values() if q.kind is p.POSITIONAL_ONLY][-1] is p


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def main() -> int:
    if sys.argv[1:] == ["--write"]:
        LOCK.write_text(render())
        return 0
    lines = differences()
    print("\n".join(lines) or "the plugin API is as locked")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
