"""`sglang-core doctor`: one row for each thing that commonly goes wrong, with the fix. Exit status 1 if any fails."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from sglang_core.cli.parser import Parser, print_json
from sglang_core.cli.table import gib, print_table
from sglang_core.errors import SglangError

OLDEST_PYTHON = (3, 11)
FEW_FILES = 4096  # a connection, a stream and a log line each hold a descriptor
SMALL_SHM = 256 * 2**20  # containers give 64 MiB by default; collectives between ranks map more
LONG_TMP = 60  # bytes of a unix socket's 108 that the temporary folder may take
LOW_MEMORY = 2 * 2**30
LOW_DISK = 2 * 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One finding. `fix` says what to do where the status is not ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str = ""


def run(argv: list[str]) -> int:
    parser = Parser("doctor", "[--port N] [--json]", "Check this environment and say how to fix it.", argv)
    parser.options.add_argument(
        "--port", type=int, default=30000, help="port that a server would listen on (default: 30000)"
    )
    parser.options.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse()
    checks = examine(args.port)
    if args.json:
        print_json([asdict(check) for check in checks])
    else:
        print_table(("check", "status", "found", "fix"), [(c.name, c.status, c.found, c.fix) for c in checks])
        failed, warned = (sum(c.status == status for c in checks) for status in ("fail", "warn"))
        print(f"{len(checks)} checks: {failed} failed, {warned} to look at")
    return 1 if any(check.status == "fail" for check in checks) else 0


def examine(port: int) -> list[Check]:
    """Every check, in order. One that itself breaks is a failed row."""
    sections: list[Callable[[], Iterator[Check]]] = [
        _python, _packages, _torch, _environment, _plugins, _devices, _host, _folders, lambda: _port(port), _sglang_name
    ]  # fmt: skip
    checks: list[Check] = []
    for section in sections:
        try:
            checks += section()
        except Exception as error:  # a doctor that dies of what it finds helps nobody
            checks.append(
                Check(name=section.__name__.strip("_"), status="fail", found=f"{type(error).__name__}: {error}")
            )
    return checks


def _python() -> Iterator[Check]:
    wanted = ".".join(map(str, OLDEST_PYTHON))
    yield Check(
        name="python",
        status="ok" if sys.version_info >= OLDEST_PYTHON else "fail",
        found=f"{platform.python_version()} at {sys.executable}",
        fix="" if sys.version_info >= OLDEST_PYTHON else f"use Python {wanted} or newer",
    )


def _packages() -> Iterator[Check]:
    """What sglang-core's own metadata asks for, against what is installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("sglang-core") or []
    except metadata.PackageNotFoundError:
        yield Check(
            name="sglang-core", status="warn", found="runs from a folder, not installed", fix="pip install -e ."
        )
        return
    wrong = []
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in wanted:
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append((requirement, "not installed"))
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append((requirement, installed))
    for requirement, installed in wrong:
        name = requirement.name
        yield Check(name=name, status="fail", found=installed, fix=f"pip install '{name}{requirement.specifier}'")
    if not wrong:
        yield Check(name="packages", status="ok", found=f"all {len(wanted)} that sglang-core needs, in range")


def _torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # broken shared libraries raise OSError
        yield Check(
            name="torch", status="fail", found=str(error), fix="reinstall torch for your device: https://pytorch.org"
        )
        return
    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    found = f"{torch.__version__}, {threads} threads on {cores} cores"
    if threads < cores // 2:
        yield Check(name="torch", status="warn", found=found, fix="unset OMP_NUM_THREADS, or give --num-threads")
    else:
        yield Check(name="torch", status="ok", found=found)


def _environment() -> Iterator[Check]:
    from sglang_core.environment import DISABLE_PLUGINS, disabled_plugins

    try:
        disabled = disabled_plugins()
    except SglangError as error:
        yield Check(name="environment", status="fail", found=str(error), fix=f"unset {DISABLE_PLUGINS}")
        return
    if disabled:
        names = ", ".join(sorted(disabled))
        yield Check(
            name="environment", status="warn", found=f"{DISABLE_PLUGINS} turns off {names}", fix="unset it to use them"
        )
    else:
        yield Check(name="environment", status="ok", found=f"{DISABLE_PLUGINS} is not set")


def _plugins() -> Iterator[Check]:
    """Every installed plugin: is this core in its API range, and does it load?"""
    from sglang_core.backend.discovery import BACKENDS, PLUGINS, load_entry, plugin_entries
    from sglang_core.backend.version import CORE_DIST

    for entry in [entry for group in (BACKENDS, PLUGINS) for entry in plugin_entries(group)]:
        ranges = [line for line in entry.requires if line.startswith(CORE_DIST)]
        found = f"{entry.dist} {entry.version}" + (f", needs {ranges[0]}" if ranges else "")
        name = f"plugin {entry.name}"
        if entry.disabled:
            yield Check(name=name, status="warn", found=f"{found}; disabled")
            continue
        try:
            load_entry(entry)
        except SglangError as error:
            yield Check(name=name, status="fail", found=found, fix=str(error))
        else:
            yield Check(name=name, status="ok", found=found)


def _devices() -> Iterator[Check]:
    from sglang_core.backend.devices import installed_backends, open_device

    for backend in installed_backends():
        for device in backend.devices:
            status: Literal["ok", "fail"] = "fail" if device.problem else "ok"
            found = f"{device.name} ({device.path})"
            yield Check(name=f"device {device.label}", status=status, found=found, fix=device.problem)
        # Several devices of a kind say the same of what they can do without.
        for note in dict.fromkeys(note for device in backend.devices for note in device.notes):
            name = f"{backend.name}: {note.name}"
            yield Check(name=name, status="warn" if note.fix else "ok", found=note.found, fix=note.fix)
        if backend.status == "absent":
            yield Check(name=f"device {backend.name}", status="warn", found="no device found", fix=backend.message)
    try:
        yield Check(name="--device auto", status="ok", found=open_device("auto").reason)
    except SglangError as error:
        yield Check(name="--device auto", status="fail", found="chooses nothing", fix=str(error))


def _host() -> Iterator[Check]:
    import psutil

    free = psutil.virtual_memory().available
    limit = _container_memory()
    found = f"{gib(free)} free" + (f", container limit {gib(limit)}" if limit else "")
    low = min(free, limit or free) < LOW_MEMORY
    yield Check(name="memory", status="warn" if low else "ok", found=found, fix="stop other programs" if low else "")
    shm = Path("/dev/shm")
    size = shutil.disk_usage(shm).total if shm.is_dir() else 0
    small = size < SMALL_SHM
    fix = "start the container with --shm-size 2g, or --ipc host" if small else ""
    yield Check(name="shared memory", status="warn" if small else "ok", found=f"/dev/shm has {gib(size)}", fix=fix)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft < FEW_FILES
    fix = f"ulimit -n {min(65536, hard) if hard > 0 else 65536}" if few else ""
    yield Check(name="open files", status="warn" if few else "ok", found=f"limit {soft}", fix=fix)


def _container_memory() -> int:
    """The cgroup's memory limit in bytes; 0 for none."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() and int(text) < 2**60 else 0
    return 0


def _folders() -> Iterator[Check]:
    tmp = tempfile.gettempdir()
    usable = os.access(tmp, os.W_OK) and len(tmp.encode()) <= LONG_TMP
    yield Check(
        name="temporary folder",
        status="ok" if usable else "fail",
        found=tmp,
        fix="" if usable else "set TMPDIR to a short writable path: the engine's unix sockets live there",
    )
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    there = next(p for p in (hub, *hub.parents) if p.exists())
    disk, offline = shutil.disk_usage(there).free, os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    low = disk < LOW_DISK or not os.access(there, os.W_OK)
    found = f"{hub}, {gib(disk)} free" + (", HF_HUB_OFFLINE is set" if offline else "")
    yield Check(
        name="hub folder",
        status="warn" if low else "ok",
        found=found,
        fix="set HF_HOME to a disk with room" if low else "",
    )
    from sglang_core import demo

    files = Path(demo.__file__).parent
    whole = (files / "model.safetensors").is_file()
    fix = "" if whole else "reinstall sglang-core: its package data is missing"
    yield Check(name="demo model", status="ok" if whole else "fail", found=str(files), fix=fix)


def _port(port: int) -> Iterator[Check]:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            yield Check(
                name=f"port {port}", status="warn", found=str(error), fix="stop what listens there, or give --port"
            )
        else:
            yield Check(name=f"port {port}", status="ok", found="free")


def _sglang_name() -> Iterator[Check]:
    """The import name `sglang` belongs to sglang-compat or to upstream SGLang, not to both."""
    owners = metadata.packages_distributions().get("sglang", [])
    if len(set(owners)) > 1:
        fix = "uninstall one: pip uninstall sglang, or pip uninstall sglang-compat"
        yield Check(name="import sglang", status="fail", found=f"claimed by {', '.join(sorted(set(owners)))}", fix=fix)
    elif owners:
        yield Check(name="import sglang", status="ok", found=f"comes from {owners[0]}")
