"""`sglang-core devices`: what `--device` can be here, and why not where it cannot."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from sglang_core.cli.parser import Parser, print_json
from sglang_core.cli.table import gib, print_table
from sglang_core.errors import SglangError

if TYPE_CHECKING:
    from sglang_core.backend.devices import InstalledBackend

COLUMNS = ("device", "path", "name", "score>", "memory>", "from", "status", "why")


def run(argv: list[str]) -> int:
    parser = Parser("devices", "[--json]", "List installed backends and the devices that each one finds.", argv)
    parser.options.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse().json
    from sglang_core.backend.devices import installed_backends, open_device

    backends = installed_backends()
    try:
        auto = open_device("auto").reason
    except SglangError as error:
        auto = f"nothing: {error}"
    if as_json:
        print_json({"backends": [asdict(backend) for backend in backends], "auto": auto})
    else:
        print_table(COLUMNS, [row for backend in backends for row in rows_of(backend)])
        print(f"--device auto is {auto}")
    return 1 if any(backend.status == "failed" for backend in backends) else 0


def rows_of(backend: InstalledBackend) -> list[tuple[object, ...]]:
    """A row for each device of a backend; one with the reason where it has none."""
    package = f"{backend.dist} {backend.version}"
    if not backend.devices:
        return [(backend.name, "", "", "", "", package, backend.status, backend.message)]
    return [
        (d.label, d.path, d.name, d.score, gib(d.total_memory) if d.total_memory else "", package)
        + (("problem", d.problem) if d.problem else (backend.status, backend.message))
        for d in backend.devices
    ]
