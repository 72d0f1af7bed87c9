"""Tile sizes and warps, by architecture: read from `configs/<arch>.json`, which are checked in. Nothing is ever tuned while serving.

A file maps an op to a list of `{"exactly": {...}, "up_to": {...}, "config": {...}}`. The first entry holds whose `exactly` are the
sizes asked about and whose bounds are all at or above them; the last one of a packaged file has neither. A config has a kernel's tile sizes
(constexprs) and Triton's launch options. What `sglang-core tune` found on this machine is a file of the same form in the user's
folder, whose entries come first.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sglang_core.api import ConfigError
from sglang_triton import pdl

Config = Mapping[str, Any]
Entry = Mapping[str, Any]
Table = Mapping[str, tuple[Entry, ...]]
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")  # what is compiled ahead of time, and has a file
ASCEND = "ascend"  # NPUs, whatever their chip: of the ops that docs/backends/npu.md names
INTERPRETER = "interpreter"  # tiles as large as can be: its time goes by the number of programs
FOLDER = "SGLANG_TRITON_CONFIGS"  # the user's folder, where it is not the usual one
ABOUT = "about"  # in a user's file: when and on what its entries were found


@functools.cache
def table(arch: str) -> Table:
    """op -> its entries, as packaged. Raises FileNotFoundError where there is no such file."""
    text = (files("sglang_triton") / "configs" / f"{arch}.json").read_text()
    return {op: tuple(entries) for op, entries in json.loads(text).items()}


def user_path(arch: str) -> Path:
    """Where entries of this machine are, if there are any."""
    if folder := os.environ.get(FOLDER):
        return Path(folder).expanduser() / f"{arch}.json"
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "sglang-core" / "triton" / f"{arch}.json"


@functools.cache
def user_table(path: Path, arch: str) -> Table:
    """op -> entries of the user's file; none where there is no file.

    Raises ConfigError where it is not what `sglang-core tune` writes for these kernels.
    """
    if not path.exists():
        return {}
    try:
        found = {op: tuple(entries) for op, entries in json.loads(path.read_text()).items() if op != ABOUT}
        for op, entries in found.items():
            known = {frozenset(entry["config"]) for entry in table(arch)[op]}
            if not all(frozenset(entry["config"]) in known for entry in entries):
                raise ValueError(f"configs of {op} have other names than this version's kernels take")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable(path, error) from error
    return found


def _unusable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"kernel configs {path} cannot be used: {type(error).__name__}: {error}; remove the file, or write it anew with"
        " `sglang-core tune`"
    )


def source(arch: str) -> str:
    """Which files configs come from, for people."""
    packaged, path = f"sglang_triton/configs/{arch}.json", user_path(arch)
    return f"{path}, then {packaged}" if path.exists() else packaged


def choose_for(arch: str, op: str, sizes: Mapping[str, int | str]) -> Config:
    """The packaged config of `arch` for an op of these sizes."""
    for entry in table(arch)[op]:
        if holds(entry, sizes):
            return MappingProxyType(entry["config"])
    raise LookupError(f"{op}: the last entry of configs/{arch}.json must have no bounds; {dict(sizes)} fits none")


def holds(entry: Entry, sizes: Mapping[str, Any]) -> bool:
    exact = all(sizes[name] == value for name, value in entry.get("exactly", {}).items())
    return exact and all(sizes[name] <= bound for name, bound in entry.get("up_to", {}).items())


Look = Callable[[str, Mapping[str, Any]], Config | None]
_look: Look | None = None  # asked first, while configs are tuned


@functools.lru_cache(maxsize=4096)
def choose(op: str, **sizes: int | str) -> Config:
    """The config for the device at hand, and with it how its kernel is launched."""
    return MappingProxyType({**in_force(op, sizes), **launch_options()})


def launch_options() -> Config:
    """Of every kernel that takes its turn (`turns`)."""
    return {"launch_pdl": True} if pdl.taken(current_arch()) else {}


def in_force(op: str, sizes: Mapping[str, int | str]) -> Config:
    """What the files say of an op of these sizes on the device at hand."""
    if _look is not None and (config := _look(op, sizes)) is not None:
        return config
    arch = current_arch()
    path = user_path(arch)
    try:
        for entry in user_table(path, arch).get(op, ()):
            if holds(entry, sizes):
                return MappingProxyType(entry["config"])
    except KeyError as error:  # a size that this version's launches do not ask about
        raise _unusable(path, error) from error
    return choose_for(arch, op, sizes)


@contextmanager
def asking(look: Look) -> Iterator[None]:
    """Inside, `look` sees each op and its sizes once, and gives a config or leaves it to the files."""
    global _look
    assert _look is None, "configs are tuned one at a time"
    _look = look
    choose.cache_clear()
    try:
        yield
    finally:
        _look = None
        choose.cache_clear()


def interpreting() -> bool:
    """Whether Triton interprets kernels: its own switch, read as it reads it. Releases before 3.4, as triton-ascend's is one, have no other way to ask."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@functools.cache
def current_arch() -> str:
    """The listed architecture that the device at hand is, or the newest that is older than it: its kernels run there too.

    Raises RuntimeError where there is none.
    """
    from triton.runtime import driver  # late: configs are read by tools that have no device

    if interpreting():
        return INTERPRETER
    target = driver.active.get_current_target()
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    return nearest(arch)


def nearest(arch: str) -> str:
    """The listed architecture whose configs are for `arch`: "sm_89" -> "sm_80". Raises RuntimeError where there is none."""
    if arch.lower().startswith(ASCEND):
        return ASCEND
    for family in ("sm_", "gfx9"):
        if arch.startswith(family):
            number = functools.partial(_number, family)
            older = [name for name in ARCHS if name.startswith(family) and number(name) <= number(arch)]
            if older:
                return max(older, key=number)
    raise RuntimeError(
        f"no kernel configs for {arch}; there are some for {', '.join(ARCHS)}, and what is newer of each family"
    )


def arch_of(path: str) -> str:
    """Of a device by its path, "cuda/sm_90", with no device opened."""
    name = path.rsplit("/", 1)[-1]
    return INTERPRETER if name == INTERPRETER else nearest(name)


def _number(family: str, arch: str) -> int:
    """Of gfx90a, 942 and 950, hexadecimal ones; those of sm_ are decimal, and in the same order when read so."""
    return int(arch.removeprefix(family), 16)
