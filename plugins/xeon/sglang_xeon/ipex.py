"""Intel Extension for PyTorch as a provider of its own: `--kernel norm.rms=ipex`.

Its kernels are listed where a version is installed that fits this torch, and it is imported when one is chosen, never before. They
stand below ours, which are measured, and above the reference bodies. Each release refuses any torch but the one that it was built
for, so the versions are compared in package metadata, without importing it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

from sglang_core.api import Kernel, SelectionContext

PACKAGE = "intel-extension-for-pytorch"
BELOW_OURS = 40


def kernels(supports: Callable[[SelectionContext], str | None]) -> list[Kernel]:
    """What it offers here; nothing where it is not installed or made for another torch."""
    if not _fits():
        return []
    return [
        Kernel(
            "norm.rms",
            provider="ipex",
            fn="sglang_xeon.ipex_kernels:rms_norm",
            device=("xeon",),
            priority=BELOW_OURS,
            supports=supports,
        )
    ]


def _fits() -> bool:
    try:
        return _release(metadata.version(PACKAGE)) == _release(metadata.version("torch"))
    except metadata.PackageNotFoundError:
        return False


def _release(version: str) -> list[str]:
    """ "2.8.10+gitabc" -> ["2", "8"]: what an IPEX release and its torch have in common."""
    return version.split("+")[0].split(".")[:2]
