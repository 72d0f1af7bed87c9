"""`sglang-conformance plugin new NAME`: a backend package that conforms to `base` as it is written.

Files of `template/` with `@name@`, `@module@`, `@Class@` and `@range@` filled in, in their paths too; `.tmpl` is taken off.
"""

from __future__ import annotations

import re
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from sglang_core.backend.version import API_VERSION
from sglang_core.errors import SglangError

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
TAKEN = ("auto", "cpu", "strict")  # what core answers to itself


def create(name: str, directory: Path) -> Path:
    """Write sglang-NAME/ into `directory` and return it. Raises SglangError where the name or the place will not do."""
    if not NAME.fullmatch(name) or name in TAKEN:
        raise SglangError(
            f"{name!r} is no name for a device: take small letters, digits and single hyphens, a letter first, and none of"
            f" {', '.join(TAKEN)}"
        )
    folder = directory / f"sglang-{name}"
    if folder.exists():
        raise SglangError(f"{folder} exists already; move it away, or give another --directory")
    major, minor = map(int, API_VERSION.split("."))
    words = {
        "@name@": name,
        "@module@": f"sglang_{name.replace('-', '_')}",
        "@Class@": "".join(part.capitalize() for part in name.split("-")),
        "@range@": f">={major}.{minor},<{major}.{minor + 1}",
    }
    _copy(resources.files(__package__) / "template", folder, words)
    return folder


def _copy(source: Traversable, target: Path, words: dict[str, str]) -> None:
    target.mkdir(parents=True)
    for entry in source.iterdir():
        name = re.sub("^dot_", ".", _fill(entry.name, words)).removesuffix(".tmpl")
        if entry.is_dir():
            _copy(entry, target / name, words)
        else:
            (target / name).write_text(_fill(entry.read_text(), words))


def _fill(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value)
    return text
