"""Programmatic dependent launches: a kernel's programs are set up while the kernel ahead of it ends (NVIDIA's CUDA programming guide, "Programmatic
Dependent Launch and Synchronization"). Most launches of a decode step of few tokens take no longer than the gap to the next.

Every kernel that `tuning.choose` gives a config for begins with `turns.take_turn`, so that it may be launched so. Off but for `SGLANG_TRITON_PDL=1`: no device
has run it. Imports neither torch nor triton.
"""

from __future__ import annotations

import os

from sglang_core.api import ConfigError

SWITCH = "SGLANG_TRITON_PDL"
ARCHS = ("sm_90", "sm_100")


def asked() -> bool:
    """Raises ConfigError where it is neither on nor off."""
    value = os.environ.get(SWITCH) or "0"
    if value not in ("0", "1"):
        raise ConfigError(f"{SWITCH}={value!r} must be 0 or 1")
    return value == "1"


def taken(arch: str) -> bool:
    """Whether launches on `arch` are such. Raises ConfigError where that was asked for and cannot be."""
    if asked() and arch not in ARCHS:
        raise ConfigError(
            f"{SWITCH}=1 asks for dependent launches, which NVIDIA's GPUs have from sm_90 on, and {arch} has not: unset it"
        )
    return asked()
