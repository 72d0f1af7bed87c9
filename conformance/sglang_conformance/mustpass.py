"""The list of all cases as it is checked in, so that a suite from which a case is missing cannot certify anybody.

One line a case: its tier, its profile, its title. The list's SHA-256 stands in a file of its own and in every report.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from sglang_conformance.case import all_cases

LIST, HASH = "mustpass.txt", "mustpass.sha256"
FULL, FAST = "full", "fast"


def current() -> str:
    """The list as the installed cases make it."""
    lines = (
        f"{FULL if case.full else FAST} {case.profile} {case.title(dtype)}\n"
        for case in all_cases()
        for dtype in case.dtypes
    )
    return "".join(sorted(lines))


def recorded() -> str:
    """The list as it is checked in."""
    return _read(LIST)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def titles(text: str, *, full: bool) -> set[str]:
    """The titles of a list; without `full` those of the fast tier."""
    rows = (line.split(" ", 2) for line in text.splitlines())
    return {title for tier, _, title in rows if full or tier == FAST}


def problems() -> list[str]:
    """How the installed cases differ from the list that is checked in, in sentences."""
    found = []
    now, then = current(), recorded()
    if sha256(then) != _read(HASH).strip():
        found.append(f"{LIST} does not have the hash in {HASH}: one of them was edited")
    new, gone = set(now.splitlines()) - set(then.splitlines()), set(then.splitlines()) - set(now.splitlines())
    for what, lines in (("not in it", new), ("missing", gone)):
        if lines:
            some = ", ".join(sorted(line.split(" ", 2)[2] for line in lines)[:3])
            found.append(f"the cases differ from {LIST}: {len(lines)} {what}, such as {some}")
    return found


def write() -> int:
    """Record the installed cases. Returns how many there are. For those who change the suite, never for those it judges."""
    folder, text = resources.files(__package__), current()
    for name, content in ((LIST, text), (HASH, sha256(text) + "\n")):
        with resources.as_file(folder / name) as path:
            path.write_text(content)
    return len(text.splitlines())


def _read(name: str) -> str:
    file = resources.files(__package__) / name
    return file.read_text() if file.is_file() else ""
