"""Entry points -> plugins: found by metadata, checked against the API version, and only then imported. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from sglang_core.backend.interface import Backend
from sglang_core.backend.version import CORE_DIST, comparable_version
from sglang_core.environment import DISABLE_PLUGINS, disabled_plugins
from sglang_core.errors import DeviceError, PluginError

BACKENDS = "sglang_core.backends"
PLUGINS = "sglang_core.plugins"


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginEntry:
    """One entry point of an installed package. Nothing of the package has been imported."""

    name: str
    dist: str
    version: str
    requires: tuple[str, ...]  # Requires-Dist lines
    entry_point: EntryPoint

    @property
    def title(self) -> str:
        return f"plugin {self.dist!r} (entry point {self.name} = {self.entry_point.value})"

    @property
    def disabled(self) -> bool:
        return not disabled_plugins().isdisjoint({self.name.lower().replace("_", "-"), canonicalize_name(self.dist)})


def plugin_entries(group: str) -> list[PluginEntry]:
    """Every entry point of `group`, by name; disabled ones too. Raises PluginError where a package has no metadata."""
    return sorted((_entry(ep) for ep in entry_points(group=group)), key=lambda e: (e.name, e.dist))


def _entry(ep: EntryPoint) -> PluginEntry:
    dist = ep.dist
    name = dist.metadata["Name"] if dist is not None and dist.metadata is not None else None
    if dist is None or not name:
        raise PluginError(
            f"entry point {ep.name} = {ep.value} of {ep.group!r} belongs to a package without metadata; reinstall that package"
        )
    return PluginEntry(
        name=ep.name, dist=name, version=dist.version, requires=tuple(dist.requires or ()), entry_point=ep
    )


def check_api(entry: PluginEntry) -> None:
    """Compare the plugin's Requires-Dist on sglang-core with this core. Raises PluginError; imports nothing of the plugin."""
    if canonicalize_name(entry.dist) == CORE_DIST:
        return
    try:
        wanted = [r for r in map(Requirement, entry.requires) if canonicalize_name(r.name) == CORE_DIST]
    except InvalidRequirement as e:
        raise PluginError(f"{entry.title}: its Requires-Dist cannot be read: {e}; reinstall {entry.dist!r}") from e
    core = comparable_version()
    ranges = [r.specifier for r in wanted if (r.marker is None or r.marker.evaluate({"extra": ""})) and r.specifier]
    if not ranges:
        raise PluginError(
            f"{entry.title} does not say which plugin API it supports; its package must depend on {CORE_DIST} with a range,"
            f" like '{CORE_DIST}>={core.major}.{core.minor},<{core.major}.{core.minor + 1}'"
        )
    for allowed in ranges:
        if not allowed.contains(core):
            raise PluginError(
                f"{entry.title} {entry.version} supports {CORE_DIST} {allowed}, and this is {CORE_DIST} {core}; install a"
                f" {entry.dist!r} made for {core.major}.{core.minor}, or disable it with {DISABLE_PLUGINS}={entry.name}"
            )


def load_entry(entry: PluginEntry) -> object:
    """Import what the entry point names, after the API check. Raises PluginError with the cause."""
    check_api(entry)
    try:
        return entry.entry_point.load()
    except (Exception, SystemExit) as e:  # a plugin's import may raise anything
        raise failed(entry, "failed to load", e) from e


def failed(entry: PluginEntry, what: str, cause: BaseException) -> PluginError:
    """The error for a plugin whose own code raised."""
    return PluginError(
        f"{entry.title} {what}: {type(cause).__name__}: {cause}; repair or uninstall {entry.dist!r}, or disable it with"
        f" {DISABLE_PLUGINS}={entry.name}"
    )


def load_backend(entry: PluginEntry) -> Backend:
    """The backend behind an entry point. Raises PluginError where it does not load or is no Backend of that name."""
    loaded = load_entry(entry)
    if not (isinstance(loaded, type) and issubclass(loaded, Backend)):
        raise PluginError(
            f"{entry.title} is no subclass of sglang_core.api.Backend, but {loaded!r}; correct the entry point"
        )
    try:
        backend = loaded()
    except (Exception, SystemExit) as e:
        raise failed(entry, "cannot be made", e) from e
    if getattr(backend, "name", None) != entry.name:
        raise PluginError(
            f"{entry.title} is named {getattr(backend, 'name', None)!r} in its class; make the entry point's name and the"
            " class's `name` equal"
        )
    return backend


def backend_entries() -> dict[str, PluginEntry]:
    """Backends by device name, without the disabled ones. Raises PluginError where two packages claim one name."""
    found: dict[str, PluginEntry] = {}
    for entry in plugin_entries(BACKENDS):
        if entry.disabled:
            continue
        if (other := found.get(entry.name)) is not None:
            raise PluginError(
                f"device {entry.name!r} is claimed by {other.dist!r} ({other.entry_point.value}) and by {entry.dist!r}"
                f" ({entry.entry_point.value}); uninstall one, or disable one with {DISABLE_PLUGINS}={entry.dist}"
            )
        found[entry.name] = entry
    return found


def find_backend(name: str) -> Backend:
    """The backend of device `name`. Raises DeviceError where no plugin provides it, PluginError where one does not load."""
    entries = backend_entries()
    if name in entries:
        return load_backend(entries[name])
    if owner := next((e for e in plugin_entries(BACKENDS) if e.name == name), None):  # so it is disabled
        raise DeviceError(
            f"device {name!r} comes from {owner.dist!r}, which {DISABLE_PLUGINS} disables; take it out of there"
        )
    raise DeviceError(
        f"no installed plugin provides device {name!r}; installed: {', '.join(entries) or 'none'}{did_you_mean(name, entries)};"
        f" otherwise install the package that provides it, e.g. `pip install sglang-{name}`"
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
