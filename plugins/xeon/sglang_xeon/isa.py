"""Which instruction sets this CPU has, as one ordered level. Reads a text file; imports nothing heavy."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from sglang_core.api import ConfigError

# Lowest first. Each level asks for its own flags and all those below it.
LEVELS = ("avx2", "avx512", "avx512_bf16", "amx")
_FLAGS = {
    "avx2": {"avx2", "fma", "bmi2"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16", "avx512_vnni"},
    "amx": {"amx_tile", "amx_bf16", "amx_int8"},
}
ENV_BF16 = "SGLANG_XEON_BF16"  # for measuring: "plain" keeps bfloat16 weights as they are
ENV = "SGLANG_XEON_ISA"  # debugging only: run as if the CPU had no more than this


def detect(cpuinfo: str, machine: str = "x86_64") -> str | None:
    """The highest level that the first processor of a /proc/cpuinfo text reaches, None where there is not even AVX2."""
    if machine not in ("x86_64", "AMD64"):
        return None
    flags = set(_field(cpuinfo, "flags").split())
    best = None
    for level in LEVELS:
        if not _FLAGS[level] <= flags:
            break
        best = level
    return best


def cpu_name(cpuinfo: str) -> str:
    return _field(cpuinfo, "model name") or "x86-64 CPU"


def read_cpuinfo(path: str = "/proc/cpuinfo") -> str:
    """Its text, "" where the file is not there (another operating system)."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def host() -> str | None:
    """The level of the CPU that this process runs on."""
    return detect(read_cpuinfo(), platform.machine())


def capped(found: str, wanted: str | None) -> str:
    """`found`, or the lower level asked for. Raises ConfigError where `wanted` is unknown or more than there is."""
    if wanted is None:
        return found
    if wanted not in LEVELS:
        raise ConfigError(f"{ENV}={wanted!r} is not one of {', '.join(LEVELS)}; unset it to use all this CPU has")
    if LEVELS.index(wanted) > LEVELS.index(found):
        raise ConfigError(f"{ENV}={wanted!r} is more than this CPU has ({found}); set a lower one or unset it")
    return wanted


def active(found: str) -> str:
    """The level to run at: `found`, unless the environment forces a lower one."""
    return capped(found, os.environ.get(ENV) or None)


def levels_here() -> tuple[str, ...]:
    """Every level that this CPU can run at, lowest first."""
    found = host()
    return () if found is None else LEVELS[: LEVELS.index(found) + 1]


def codes_exponents(level: str) -> bool:
    """Whether bfloat16 weights are packed with coded exponents. Raises ConfigError for a value of SGLANG_XEON_BF16 that is none."""
    wanted = os.environ.get(ENV_BF16) or "coded"
    if wanted not in ("coded", "plain"):
        raise ConfigError(f"{ENV_BF16}={wanted!r}: it may be 'coded' (the default) or 'plain'")
    return wanted == "coded" and LEVELS.index(level) >= LEVELS.index("avx512_bf16")


def _field(cpuinfo: str, key: str) -> str:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


if __name__ == "__main__":  # for `make test-isa`
    print(*levels_here())
