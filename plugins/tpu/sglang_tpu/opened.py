"""Opening a device through JAX, which decides once for a process which platforms it has, and where compiled programs are kept."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import jax

from sglang_core.api import DeviceError, DeviceInfo

CACHE = "SGLANG_TPU_CACHE"
log = logging.getLogger(__name__)


def open_device(info: DeviceInfo) -> jax.Device:
    """The device of JAX that a probe's is. Raises DeviceError where it cannot be had."""
    emulated = bool(info.facts.get("emulated"))
    use_compilation_cache(emulated)
    if emulated:
        log.warning("no TPU: %s stands in for one, for tests", info.name)
    _platforms(
        "cpu" if emulated else "tpu,cpu"
    )  # without, JAX tries all that are installed: libtpu looks for TPUs for minutes
    try:
        found = jax.devices("cpu" if emulated else "tpu")
    except RuntimeError as e:
        raise DeviceError(
            f"{info.label} ({info.name}) cannot be opened: {e}; one process has all TPUs of a host: see that no other runs"
        ) from e
    if emulated:
        return _default(found[0])
    if info.index >= len(found):
        raise DeviceError(
            f"{info.label}: JAX lists {len(found)} TPUs (TPU_VISIBLE_CHIPS may hide some); take one of those"
        )
    if (kind := found[info.index].device_kind) != info.name:
        raise DeviceError(
            f"{info.label} is a {info.name} on the PCI bus, and JAX says {kind!r}: libtpu is of another release?"
        )
    return _default(found[info.index])


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


def _default(device: jax.Device) -> jax.Device:
    """What is put on a device, and by none it is said on which, goes there."""
    jax.config.update("jax_default_device", device)
    return device


def _platforms(wanted: str) -> None:
    """As the user says, else as wanted; nothing once JAX has begun."""
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", wanted)
