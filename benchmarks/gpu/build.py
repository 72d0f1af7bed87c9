"""Part `build`: what is installed, what the device is, and whether every kernel compiles for it within its budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.gpu.session import Case, Facts

ROOT = Path(__file__).parents[2]
BUDGETS = Path(__file__).with_name("budgets.json")
SMALL_ONLY = "norm.rms[M=128]"  # one kernel, for a host
COMMAND_LIMIT = 120.0  # seconds
HOST_ARCH = "sm_90"  # what a host compiles for


def cases(device: str, path: str, only: str = "", *, small: bool) -> Iterator[Case]:
    """Those whose name contains `only`. `path`: the device's, "cuda/sm_90"."""
    yield from (case for case in all_cases(device, path, small=small) if only in case.name)


def all_cases(device: str, path: str, *, small: bool) -> Iterator[Case]:
    yield Case("sglang-core doctor", partial(said, ["doctor", "--json"]), seconds=60)
    yield Case("sglang-core devices", partial(said, ["devices", "--json"]))
    yield Case(
        "sglang-core explain demo", partial(said, ["explain", "--model-path", "demo", "--device", device, "--json"])
    )
    from sglang_triton.aot import specs

    arch = arch_of(path)
    found = [spec.title for spec in specs(SMALL_ONLY if small else "") if not spec.archs or arch in spec.archs]
    for title in dict.fromkeys(found):
        yield Case(f"compile {title}", partial(compiled, title, arch), seconds=20)


def arch_of(path: str) -> str:
    from sglang_triton.tuning import ARCHS, nearest

    name = path.rsplit("/", 1)[-1]
    return nearest(name) if name.startswith(("sm_", "gfx")) else HOST_ARCH if HOST_ARCH in ARCHS else ARCHS[0]


def said(args: list[str]) -> Facts:
    """What a command prints as JSON. A command that finds something wrong says so in its status."""
    done = subprocess.run(
        [sys.executable, "-m", "sglang_core", *args], capture_output=True, text=True, check=False, timeout=COMMAND_LIMIT
    )
    if not done.stdout.strip():
        raise RuntimeError(f"status {done.returncode}: {done.stderr.strip()[-500:]}")
    return {"status": done.returncode, "said": json.loads(done.stdout)}


def compiled(title: str, arch: str) -> Facts:
    """In a process of its own: Triton compiles nothing where it interprets, and a compiler that crashes takes one kernel with it."""
    code = (
        "import json, sys; from dataclasses import asdict; from sglang_triton import aot;"
        " title, arch = sys.argv[1:];"
        " spec = next(s for s in aot.specs(title) if s.title == title and (not s.archs or arch in s.archs));"
        " usage, text = aot.compile_spec(spec, arch);"
        " print(json.dumps({**asdict(usage), 'missing': aot.missing_instructions(spec, arch, text)}))"
    )
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, title, arch],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
        timeout=COMMAND_LIMIT,
    )
    if done.returncode:
        # Behind the error may stand what nanobind says of objects that Python left at its exit; Triton's do where a kernel knows tensor memory.
        said, _, _ = done.stderr.partition("nanobind: leaked")
        raise RuntimeError(said.strip()[-500:])
    facts: Facts = json.loads(done.stdout.splitlines()[-1])
    budget = json.loads(BUDGETS.read_text()).get(arch, {}).get(title, {})
    over = [name for name, most in budget.items() if facts[name] > most]
    return facts | {"over_budget": ", ".join(over), "arch": arch}
