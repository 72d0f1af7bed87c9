"""Documents of which parts follow from the code: each stands between two comments that name it and the tool that makes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
Parts = Mapping[str, Callable[[], str]]


def main(document: str, tool: str, parts: Parts) -> int:
    """Write the parts of docs/`document`; with `--check` on the command line only say whether they are up to date.

    Returns the exit status: 1 where they are not.
    """
    path = DOCS / document
    old = path.read_text()
    new = render(old, document, tool, parts)
    if "--check" in sys.argv[1:]:
        if new != old:
            print(f"docs/{document} is out of date: run python tools/{tool}")
        return int(new != old)
    path.write_text(new)
    return 0


def render(text: str, document: str, tool: str, parts: Parts) -> str:
    """`text` with each part put between its markers."""
    for name, make in parts.items():
        begin, end = f"<!-- {name}: made by tools/{tool} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        assert found, f"docs/{document} has no marker {begin}"
        assert end in rest, f"docs/{document} has no marker {end}"
        text = f"{before}{begin}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text
