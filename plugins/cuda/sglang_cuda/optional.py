"""Packages with kernels that are used where they are installed: which releases their provider was written against. Imports none of them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet


def problem(package: str, releases: str) -> str:
    """Why a package cannot be used: "" or a reason. `releases`: as in a requirement, ">=1.0,<1.1"."""
    try:
        found = version(package)
    except PackageNotFoundError:
        return f"{package} is not installed; pip install '{package}{releases}'"
    if found not in SpecifierSet(releases, prereleases=True):
        return f"it is written for {package} {releases}, and {found} is installed"
    return ""
