"""Tile sizes and warps, by architecture: read from `configs/<arch>.json`, which are checked in. Nothing is ever tuned while serving.

A file maps an op to a list of `{"up_to": {...}, "config": {...}}`. The first entry holds whose bounds are all at or above the
sizes asked about; the last one has no bounds. A config has a kernel's tile sizes (constexprs) and Triton's launch options.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType
from typing import Any

Config = Mapping[str, Any]
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")  # what is compiled ahead of time, and has a file
INTERPRETER = "interpreter"  # tiles as large as can be: its time goes by the number of programs


@functools.cache
def table(arch: str) -> Mapping[str, tuple[Mapping[str, Any], ...]]:
    """op -> its entries. Raises FileNotFoundError where there is no such file."""
    text = (files("sglang_triton") / "configs" / f"{arch}.json").read_text()
    return {op: tuple(entries) for op, entries in json.loads(text).items()}


def choose_for(arch: str, op: str, sizes: Mapping[str, int]) -> Config:
    """The config of `arch` for an op of these sizes."""
    for entry in table(arch)[op]:
        if all(sizes[name] <= bound for name, bound in entry.get("up_to", {}).items()):
            return MappingProxyType(entry["config"])
    raise LookupError(f"{op}: the last entry of configs/{arch}.json must have no bounds; {dict(sizes)} fits none")


@functools.lru_cache(maxsize=4096)
def choose(op: str, **sizes: int) -> Config:
    """The config for the device at hand."""
    return choose_for(current_arch(), op, sizes)


@functools.cache
def current_arch() -> str:
    """The listed architecture that the device at hand is, or the newest that is older than it: its kernels run there too.

    Raises RuntimeError where there is none.
    """
    from triton import knobs  # late: configs are read by tools that have no device
    from triton.runtime import driver

    if knobs.runtime.interpret:
        return INTERPRETER
    target = driver.active.get_current_target()
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    return nearest(arch)


def nearest(arch: str) -> str:
    """The listed architecture whose configs are for `arch`: "sm_89" -> "sm_80". Raises RuntimeError where there is none."""
    for family in ("sm_", "gfx9"):
        if arch.startswith(family):
            number = functools.partial(_number, family)
            older = [name for name in ARCHS if name.startswith(family) and number(name) <= number(arch)]
            if older:
                return max(older, key=number)
    raise RuntimeError(
        f"no kernel configs for {arch}; there are some for {', '.join(ARCHS)}, and what is newer of each family"
    )


def _number(family: str, arch: str) -> int:
    """Of gfx90a, 942 and 950, hexadecimal ones; those of sm_ are decimal, and in the same order when read so."""
    return int(arch.removeprefix(family), 16)
