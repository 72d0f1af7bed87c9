"""`--device` -> one device: a name, a name with index or label, or the best one probed. Opens nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sglang_core.backend.discovery import (
    BACKENDS,
    PluginEntry,
    backend_entries,
    failed,
    find_backend,
    load_backend,
    plugin_entries,
)
from sglang_core.backend.interface import Backend, DeviceInfo
from sglang_core.errors import DeviceError, SglangError

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenDevice:
    """The device to run on, its backend, and in words why this one."""

    backend: Backend
    info: DeviceInfo
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class InstalledBackend:
    """One row of the `devices` listing. `message` says what is wrong, and what to do, where `status` is not "ok"."""

    name: str
    dist: str
    version: str
    status: Literal["ok", "absent", "disabled", "failed"]
    devices: tuple[DeviceInfo, ...] = ()
    message: str = ""


def open_device(device: str) -> ChosenDevice:
    """The device that `device` means: NAME, NAME:INDEX, NAME:LABEL or auto.

    Raises DeviceError where nothing answers to it, PluginError where a plugin that was asked does not work.
    """
    if device == AUTO:
        return _best_device()
    name, colon, which = device.partition(":")
    if not name or (colon and not which):
        raise DeviceError(f"device {device!r} is not understood; write NAME, NAME:INDEX, NAME:LABEL or {AUTO}")
    backend = find_backend(name)
    infos = _probe(backend)
    if not infos:
        raise DeviceError(f"device {name!r} is not here: {backend.absent_reason()}")
    if not which:
        return _chosen(backend, infos[0], f"{device!r} was asked for; {infos[0].label} is its best")
    for info in infos:
        if which in _labels(info):
            return _chosen(backend, info, f"{device!r} was asked for")
    known = ", ".join(f"{name}:{info.index} ({info.path})" for info in infos)
    raise DeviceError(f"device {device!r} is not here; {name!r} has {known}")


def installed_backends() -> list[InstalledBackend]:
    """Every installed backend and its devices, or what is wrong with it. Raises nothing a plugin does."""
    entries = plugin_entries(BACKENDS)
    claims: dict[str, list[PluginEntry]] = {}
    for entry in entries:
        if not entry.disabled:
            claims.setdefault(entry.name, []).append(entry)
    return [_row(entry, claims.get(entry.name, [])) for entry in entries]


def _row(entry: PluginEntry, claimants: list[PluginEntry]) -> InstalledBackend:
    def row(
        status: Literal["ok", "absent", "disabled", "failed"], infos: tuple[DeviceInfo, ...] = (), message: str = ""
    ) -> InstalledBackend:
        return InstalledBackend(
            name=entry.name, dist=entry.dist, version=entry.version, status=status, devices=infos, message=message
        )

    if entry.disabled:
        return row("disabled", message="SGLANG_DISABLE_PLUGINS names it")
    if len(claimants) > 1:
        return row("failed", message=f"claimed by {' and by '.join(repr(c.dist) for c in claimants)}; uninstall one")
    try:
        backend = load_backend(entry)
        infos = tuple(_probe(backend, entry))
    except SglangError as e:
        return row("failed", message=str(e))
    return row("ok", infos) if infos else row("absent", message=backend.absent_reason())


def _best_device() -> ChosenDevice:
    """The highest score over all backends. One that does not load raises: a stale plugin must not mean a quiet CPU run."""
    found: list[tuple[Backend, DeviceInfo]] = []
    absent: list[str] = []
    for backend in map(load_backend, backend_entries().values()):
        infos = _probe(backend)
        found += [(backend, info) for info in infos[:1] if info.score >= 0]  # below 0: never taken unasked
        absent += [] if infos else [f"{backend.name} is not here ({backend.absent_reason()})"]
    if not found:
        raise DeviceError(
            "; ".join([*absent, "no installed plugin found a device"])
            + "; install the package of your device, e.g. `pip install sglang-NAME`"
        )
    found.sort(key=lambda pair: -pair[1].score)
    (backend, best), *others = found
    if others and others[0][1].score == best.score:
        raise DeviceError(
            f"{best.label} and {others[0][1].label} both score {best.score}; choose one with --device {best.backend} or"
            f" --device {others[0][1].backend}"
        )
    beaten = [f"{info.label} scores {info.score}" for _, info in others]
    reason = f"{best.label} ({best.name}) has the best score, {best.score}"
    return _chosen(backend, best, "; ".join([reason, *beaten, *absent]))


def _chosen(backend: Backend, info: DeviceInfo, reason: str) -> ChosenDevice:
    """The best device with a problem is an error too: the next best must not run in its place unasked."""
    if info.problem:
        raise DeviceError(f"device {info.label} ({info.name}) cannot be opened: {info.problem}")
    return ChosenDevice(backend=backend, info=info, reason=reason)


def _probe(backend: Backend, entry: PluginEntry | None = None) -> list[DeviceInfo]:
    try:
        return list(backend.probe())
    except Exception as e:
        entry = entry or backend_entries()[backend.name]
        raise failed(entry, "raised in probe(), which must return [] where it finds nothing", e) from e


def _labels(info: DeviceInfo) -> set[str]:
    """What may stand after the colon: the index, the path below the family, or the path's last segment."""
    _, _, below = info.path.partition("/")
    return {str(info.index), below, info.path.rsplit("/", 1)[-1]} - {""}
