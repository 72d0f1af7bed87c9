"""Packages with kernels that are used where they are installed: which releases their provider was written against. Imports none of them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from sglang_core.api import DeviceNote


def problem(package: str, releases: str, source: str = "") -> str:
    """Why a package cannot be used: "" or a reason. `releases`: as in a requirement, ">=1.0,<1.1". `source`: where to get it, if no index has it."""
    try:
        found = version(package)
    except PackageNotFoundError:
        how = f"get {package}{releases} from {source}" if source else f"pip install '{package}{releases}'"
        return f"{package} is not installed; {how}"
    if found not in SpecifierSet(releases, prereleases=True):
        return f"it is written for {package} {releases}, and {found} is installed"
    return ""


def provider_note(name: str, missing: str) -> DeviceNote:
    """For `sglang-core doctor`; `missing`: of `problem`. Nothing is wrong where a package is missing: other kernels run."""
    return DeviceNote(name=name, found=f"not used: {missing}" if missing else "used: `explain` says where")
