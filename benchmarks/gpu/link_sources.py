"""Metadata of source trees without a build: `python link_sources.py SITE TREE...` writes a .dist-info for each, so that plugins are found.

What an entry point names must be on PYTHONPATH as well. A machine without a network has no build backend to ask.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def link(site: Path, tree: Path) -> Path:
    """-> the folder written: name, version, requirements and entry points of the tree's pyproject.toml."""
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in project.get("dependencies", ())]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    groups = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()) for group, entries in groups_of(project)
    ]
    (folder / "entry_points.txt").write_text("\n".join(groups))
    return folder


def groups_of(project: dict[str, dict[str, dict[str, str]]]) -> list[tuple[str, dict[str, str]]]:
    scripts = [("console_scripts", project["scripts"])] if "scripts" in project else []
    return [*scripts, *project.get("entry-points", {}).items()]


if __name__ == "__main__":
    for tree in sys.argv[2:]:
        link(Path(sys.argv[1]), Path(tree))
