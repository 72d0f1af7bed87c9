"""Which Triton is installed. Imports neither it nor torch.

It comes with PyTorch, and not always by that name: PyTorch's own builds for ROCm ask for a package of another name with the same folder in it, AMD's for one
named triton. So sglang-triton asks for none: pip would lay PyPI's over theirs.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

PACKAGES = ("triton", "triton-rocm", "pytorch-triton-rocm")
RELEASES = ">=3.6,<3.10"


def installed() -> dict[str, str]:
    """Its packages and their versions."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def problem(install: str) -> str:
    """Why it cannot be used: "" or a sentence. `install`: what brings the right PyTorch, and Triton with it."""
    found = installed()
    if not found:
        return f"Triton is not installed, which comes with PyTorch; {install}"
    if len(found) > 1:
        names = " and ".join(f"{package} {release}" for package, release in found.items())
        return f"{names} are installed, in one folder; pip uninstall {' '.join(found)}, then {install}"
    ((package, release),) = found.items()
    if release not in SpecifierSet(RELEASES, prereleases=True):
        return f"kernels are for Triton {RELEASES}, and {package} {release} is installed; {install}"
    return ""
