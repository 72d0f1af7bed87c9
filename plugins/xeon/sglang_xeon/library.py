"""The compiled kernels as `torch.ops.sglang_xeon`. Importing this loads them and sets their ISA level."""

from __future__ import annotations

import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from sglang_core.api import PluginError
from sglang_xeon import isa

_level = ""

# What oneDNN, which torch's own matrix products call, may use where a level is forced. It reads this at its first call.
_ONEDNN = {"avx2": "AVX2", "avx512": "AVX512_CORE", "avx512_bf16": "AVX512_CORE_BF16"}


def _load() -> Any:
    folder = Path(__file__).parent
    found = [folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES if (folder / f"_C{suffix}").exists()]
    if not found:
        raise PluginError(
            f"sglang-xeon has no compiled kernels in {folder}; build them with"
            " pip install --no-build-isolation ./plugins/xeon"
        )
    torch.ops.load_library(str(found[0]))  # type: ignore[no-untyped-call]
    return torch.ops.sglang_xeon


def set_isa(level: str) -> None:
    """Run every kernel of this process at `level`. Raises ConfigError where this CPU lacks it."""
    host = isa.host()
    if host is None:
        raise PluginError("sglang-xeon needs an x86-64 CPU with AVX2 and FMA; choose another --device")
    global _level
    _level = isa.capped(host, level)
    ops.set_isa(_level)


def level() -> str:
    """What set_isa chose."""
    return _level


def _start() -> None:
    level = isa.active(isa.host() or "avx2")
    if os.environ.get(isa.ENV) and level in _ONEDNN:
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", _ONEDNN[level])
    set_isa(level)


ops = _load()
_start()
