"""Compile every kernel for every architecture, with no device, and hold what comes out to a budget.

    python -m sglang_triton.aot --check benchmarks/gpu/budgets.json            # all of it
    python -m sglang_triton.aot --arch sm_90 --only norm --check ...           # some of it
    python -m sglang_triton.aot --write benchmarks/gpu/budgets.json            # what is used now becomes the budget
    SGLANG_TRITON_PDL=1 python -m sglang_triton.aot --arch sm_90 sm_100        # that nothing is touched before a kernel's turn

That a kernel compiles says nothing of its results. Triton compiles in no process that interprets: TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_triton import pdl
from sglang_triton.aot_spec import AotSpec
from sglang_triton.kernels import KERNELS
from sglang_triton.tuning import ARCHS

# Shared memory that one program may have, in bytes: triton compiles what exceeds it, and the launch fails.
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
# What another kernel may write or read, in PTX: whoever is launched before the kernel ahead has ended waits before it touches any.
WAIT = "griddepcontrol.wait"
ACCESS = re.compile(r"^\s*(@!?%\w+\s+)?(ld|st|atom|red|cp\.async)\b[\w.:]*(global|bulk|async)", re.MULTILINE)
REGISTER_STEP = 8  # registers are handed out in eights; and releases of Triton differ by some
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "waves_per_eu", "matrix_instr_nonkdim")


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a compiled kernel needs of the device: registers a thread, bytes spilled, bytes of shared memory a program."""

    registers: int
    spills: int
    shared: int

    def over(self, budget: Usage) -> list[str]:
        """What exceeds the budget, in words."""
        mine, most = asdict(self), asdict(budget)
        return [f"{mine[name]} {name}, and its budget is {most[name]}" for name in mine if mine[name] > most[name]]


# Of no op: the runtime of GPUs launches one, several ops the other.
MODULES = ("sglang_triton.page_copy", "sglang_triton.grouping")


def specs(only: str = "") -> list[AotSpec]:
    """Those of every kernel module, in the kernels' order; with `only`, those whose title contains it."""
    modules = dict.fromkeys([*(kernel.fn.split(":")[0] for kernel in KERNELS), *MODULES])
    return [spec for module in modules for spec in importlib.import_module(module).AOT if only in spec.title]


def compiled(spec: AotSpec, arch: str) -> Any:
    """What Triton makes of it: stages of compilation in `asm`, `metadata`. Raises what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    config = dict(spec.config(arch))
    options = {name: config.pop(name) for name in OPTIONS if name in config}
    names = spec.kernel.arg_names
    constexprs = {name: value for name, value in {**spec.constexprs, **config}.items() if name in names}
    signature = {name: "constexpr" if name in constexprs else spec.signature[name] for name in names}
    source = (gluon_source() if spec.kernel.is_gluon() else triton.compiler.ASTSource)(
        spec.kernel, signature, constexprs, spec.attrs()
    )
    return triton.compile(source, target=target, options=options)


def compile_spec(spec: AotSpec, arch: str) -> tuple[Usage, str]:
    """Compile, and give what it uses and its assembly. Raises what the compiler raises."""
    made = compiled(spec, arch)
    return usage_of(made, arch), made.asm["amdgcn" if arch.startswith("gfx") else "ptx"]


def usage_of(made: Any, arch: str) -> Usage:
    """Of what `compiled` gives."""
    if arch.startswith("gfx"):
        return _hip_usage(made.asm["amdgcn"], made.metadata.shared)
    return _cuda_usage(made.asm["ptx"], arch, made.metadata.shared)


def gluon_source() -> Any:
    """Triton's class for kernels in Gluon. No public name has it."""
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _hip_usage(assembly: str, shared: int) -> Usage:
    """Registers are vector and accumulation registers together: a wave has 512 of both."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, f"no .{name} in the assembly"
        return int(found[1])

    return Usage(registers=field("vgpr_count"), spills=4 * field("vgpr_spill_count"), shared=shared)


def _cuda_usage(ptx: str, arch: str, shared: int) -> Usage:
    from triton.backends.nvidia.compiler import (
        get_ptxas,
    )  # the one of several that Triton itself uses for the architecture

    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx)
        gpu = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
        assert gpu is not None, "PTX without a target"
        tool = get_ptxas(int(arch.removeprefix("sm_"))).path
        command = [tool, "-v", f"--gpu-name={gpu[1]}", source, "-o", Path(scratch) / "kernel.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None, f"ptxas says nothing of registers: {log}"
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))
    return Usage(registers=int(registers[1]), spills=spills, shared=shared)


def missing_instructions(spec: AotSpec, arch: str, assembly: str) -> list[str]:
    """`instructions` of the architecture that are not there, in words."""
    found = [texts for prefix, texts in spec.instructions.items() if arch.startswith(prefix)]
    wanted = [text for texts in found for text in ((texts,) if isinstance(texts, str) else texts)]
    return [f"no {text} in its assembly" for text in wanted if text not in assembly]


def hasty(ptx: str) -> list[str]:
    """What is wrong with a kernel that may be launched before the one ahead has ended, in words."""
    before, found, _ = ptx.partition(WAIT)
    if not found:
        return [f"no {WAIT}, and it may be launched before the kernel ahead has ended"]
    return [f"{access[0].strip()} before its {WAIT}" for access in ACCESS.finditer(before)]


def problems_of(usage: Usage, budget: Mapping[str, int] | None, arch: str) -> Iterator[str]:
    """`budget`: None where the file has none for it."""
    if usage.shared > SHARED_LIMITS[arch]:
        yield f"{usage.shared} bytes of shared memory, and {arch} has {SHARED_LIMITS[arch]}"
    if budget is None:
        yield "has no budget; run with --write, and look at what it says"
    else:
        yield from usage.over(Usage(**budget))


def run(
    archs: Iterable[str], chosen: list[AotSpec], budgets: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[str]]:
    """Compile all of it. What each uses, by architecture and title; and what is wrong, in lines."""
    used: dict[str, Any] = {}
    wrong: list[str] = []
    for arch in archs:
        used[arch] = {}
        for spec in chosen:
            if spec.archs and arch not in spec.archs:
                continue
            where = f"{arch} {spec.title}"
            try:
                usage, assembly = compile_spec(spec, arch)
            except Exception as e:  # the compiler's own
                wrong.append(f"{where}: does not compile: {type(e).__name__}: {e}")
                continue
            used[arch][spec.title] = usage
            found = missing_instructions(spec, arch, assembly)
            if pdl.asked() and arch in pdl.ARCHS and not spec.kernel.is_gluon():
                found += hasty(assembly)
            if budgets is not None:
                found += problems_of(usage, budgets.get(arch, {}).get(spec.title), arch)
            wrong += [f"{where}: {text}" for text in found]
            print(f"{where}: {usage.registers} registers, {usage.spills} bytes spilled, {usage.shared} bytes shared")
    return used, wrong


def _as_budgets(used: Mapping[str, Mapping[str, Usage]], old: Mapping[str, Any]) -> dict[str, Any]:
    """What is used, rounded up; entries of what was not compiled now stay."""
    made: dict[str, Any] = {arch: dict(entries) for arch, entries in old.items()}
    for arch, entries in used.items():
        for title, usage in entries.items():
            registers = (usage.registers // REGISTER_STEP + 1) * REGISTER_STEP
            made.setdefault(arch, {})[title] = asdict(usage) | {"registers": registers}
    return made


def write(path: Path, budgets: Mapping[str, Mapping[str, Any]]) -> None:
    """One line a kernel."""
    blocks = [
        f' "{arch}": {{\n' + ",\n".join(f'  "{t}": {json.dumps(u)}' for t, u in sorted(entries.items())) + "\n }"
        for arch, entries in budgets.items()
    ]
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def main(argv: list[str] | None = None) -> int:
    """0: all compiles, within its budgets. 1: not so."""
    parser = argparse.ArgumentParser(prog="python -m sglang_triton.aot", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose title contains TEXT")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", type=Path, metavar="FILE", help="hold what is used to these budgets")
    group.add_argument("--write", type=Path, metavar="FILE", help="make what is used now the budget")
    args = parser.parse_args(argv)
    budgets = json.loads(args.check.read_text()) if args.check else None
    used, wrong = run(args.arch, specs(args.only), budgets)
    for line in wrong:
        print(f"FAIL {line}", file=sys.stderr)
    if args.write:
        write(args.write, _as_budgets(used, json.loads(args.write.read_text()) if args.write.exists() else {}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
