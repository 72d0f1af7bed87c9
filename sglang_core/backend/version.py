"""The version of the plugin API: the core's own major.minor. A plugin states the range it supports in its Requires-Dist."""

from __future__ import annotations

from importlib import metadata

from packaging.version import Version

CORE_DIST = "sglang-core"
API_VERSION = "0.1"


def core_version() -> str:
    """The installed core's version, or the API version where the core runs from a checkout that is not installed."""
    try:
        return metadata.version(CORE_DIST)
    except metadata.PackageNotFoundError:
        return f"{API_VERSION}.0"


def comparable_version() -> Version:
    """What plugin ranges are checked against: without dev and pre-release parts, so that 0.1.0.dev1 is within >=0.1."""
    return Version(Version(core_version()).base_version)
