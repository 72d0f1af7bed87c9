"""Opening a device through JAX, which decides once for a process which platforms it has, and where compiled programs are kept."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import jax

from sglang_core.api import DeviceError, DeviceInfo
from sglang_tpu import chips

CACHE = "SGLANG_TPU_CACHE"
HOST_DEVICES = "--xla_force_host_platform_device_count"
log = logging.getLogger(__name__)


def open_devices(infos: Sequence[DeviceInfo]) -> list[jax.Device]:
    """The devices of JAX that a probe's are: one, or those of a mesh. Raises DeviceError where they cannot be had."""
    info = infos[0]
    emulated = bool(info.facts.get("emulated"))
    use_compilation_cache(emulated)
    if emulated:
        log.warning("no TPU: %s stands in for %d, for tests", info.name, len(infos))
        _host_devices(len(infos))
    first = 0 if emulated else chips.see_only(infos, len(chips.on_this_host()))
    _platforms(
        "cpu" if emulated else "tpu,cpu"
    )  # without, JAX tries all that are installed: libtpu looks for TPUs for minutes
    try:
        found = jax.devices("cpu" if emulated else "tpu")
    except RuntimeError as e:
        raise DeviceError(
            f"{info.label} ({info.name}) cannot be opened: {e}; a TPU is one process's: see that no other has it"
        ) from e
    opened = _emulated(found, len(infos)) if emulated else [_opened(each, found, first) for each in infos]
    jax.config.update("jax_default_device", opened[0])  # where goes what is put on none by name
    return opened


def _opened(info: DeviceInfo, found: Sequence[jax.Device], first: int) -> jax.Device:
    index = info.index - first
    if index >= len(found):
        raise DeviceError(
            f"{info.label}: JAX lists {len(found)} TPUs (TPU_VISIBLE_CHIPS may hide some); take one of those"
        )
    if (kind := found[index].device_kind) != info.name:
        raise DeviceError(
            f"{info.label} is a {info.name} on the PCI bus, and JAX says {kind!r}: libtpu is of another release?"
        )
    return found[index]


def _emulated(found: Sequence[jax.Device], wanted: int) -> list[jax.Device]:
    if len(found) < wanted:
        raise DeviceError(
            f"{wanted} ranks: the host is {len(found)} devices to JAX, which was up in this process before they were asked for; use a fresh"
            f" process, or set XLA_FLAGS={HOST_DEVICES}={wanted}"
        )
    return list(found[:wanted])


def _host_devices(wanted: int) -> None:
    """Has JAX take the host for as many devices, unless the user says how many; nothing once JAX has begun."""
    if wanted > 1 and HOST_DEVICES not in os.environ.get("XLA_FLAGS", ""):
        with suppress(RuntimeError):  # it has begun: `_emulated` counts what there is
            jax.config.update("jax_num_cpu_devices", wanted)


def use_compilation_cache(emulated: bool, environ: Mapping[str, str] = os.environ) -> None:
    """Keep compiled programs on disk, for the next start: in SGLANG_TPU_CACHE, a folder, or 0 for none; by default under ~/.cache.

    JAX_COMPILATION_CACHE_DIR comes first. What is emulated is kept only where a folder is named: it compiles in no time.
    """
    folder = environ.get(CACHE) or ("0" if emulated else "")
    if folder == "0" or jax.config.jax_compilation_cache_dir:
        return
    home = environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(folder or f"{home}/sglang-tpu/programs").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a start compiles hundreds of small ones too
    log.info("compiled programs are kept in %s", path)


def _platforms(wanted: str) -> None:
    """As the user says, else as wanted; nothing once JAX has begun."""
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", wanted)
