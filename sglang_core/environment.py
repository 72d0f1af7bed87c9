"""The only module that reads SGLANG_* environment variables. They are for debugging; a malformed one raises."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from sglang_core.errors import ConfigError

DISABLE_PLUGINS = "SGLANG_DISABLE_PLUGINS"
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


def disabled_plugins(environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Entry or package names in SGLANG_DISABLE_PLUGINS=a,b, in lower case. Raises ConfigError where one is no name."""
    text = environ.get(DISABLE_PLUGINS, "").strip()
    if not text:
        return frozenset()
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{DISABLE_PLUGINS}={text!r}: {name!r} is no plugin name; write names with commas between, as in 'a,b'"
            )
    return frozenset(name.lower().replace("_", "-") for name in names)
