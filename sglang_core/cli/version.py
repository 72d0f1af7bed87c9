"""`sglang-core version`: what is installed, read from package metadata; nothing is imported."""

from __future__ import annotations

import platform
from importlib import metadata

from sglang_core import __version__
from sglang_core.cli.parser import Parser, print_json

STANDS_ON = ("torch", "transformers", "tokenizers", "safetensors", "fastapi", "uvicorn", "pydantic", "msgspec", "pyzmq")


def run(argv: list[str]) -> int:
    parser = Parser("version", "[--json]", "Show versions of the core, its plugins and what they stand on.", argv)
    parser.options.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse().json
    versions = collect()
    if as_json:
        print_json(versions)
    else:
        width = max(map(len, versions))
        print("\n".join(f"{name:<{width}}  {version}" for name, version in versions.items()))
    return 0


def collect() -> dict[str, str]:
    """Package -> version, ours first."""
    from sglang_core.backend.discovery import BACKENDS, PLUGINS, plugin_entries
    from sglang_core.backend.version import API_VERSION

    versions = {"sglang-core": __version__, "plugin API": API_VERSION}
    versions |= {entry.dist: entry.version for group in (BACKENDS, PLUGINS) for entry in plugin_entries(group)}
    versions |= {"python": platform.python_version(), "platform": platform.platform()}
    return versions | {name: _installed(name) for name in STANDS_ON}


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
