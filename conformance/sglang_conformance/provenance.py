"""What a report says about where it was made: versions, hashes of the code that ran, the device."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sglang_core.backend.interface import DeviceInfo


def packages(modules: Iterable[str]) -> dict[str, str]:
    """Top-level package -> SHA-256 over the files of its code, in order of their names."""
    return {name: _hash(name) for name in sorted({module.partition(".")[0] for module in modules})}


def _hash(package: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return ""
    digest = hashlib.sha256()
    for folder in spec.submodule_search_locations:
        files = (f for f in Path(folder).rglob("*") if f.suffix in (".py", ".so", ".txt", ".json") and f.is_file())
        for file in sorted(files):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def device(info: DeviceInfo) -> dict[str, Any]:
    """The device as its backend describes it."""
    notes = [dataclasses.asdict(note) for note in info.notes]
    return dataclasses.asdict(info) | {"facts": dict(info.facts), "versions": dict(info.versions), "notes": notes}


def versions() -> dict[str, str]:
    found = {name: version(name) for name in ("sglang-core", "sglang-conformance", "torch")}
    return found | {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
