"""Compile every Pallas kernel for TPUs with libtpu and no TPU, and hold what comes out to a budget.

    python -m sglang_tpu.aot --check benchmarks/tpu/budgets.json                       # all of it
    python -m sglang_tpu.aot --chip v6e --only attn.mla_paged --check ...              # some of it
    python -m sglang_tpu.aot --write benchmarks/tpu/budgets.json                       # what is used now becomes the budget

Mosaic and XLA compile as on the machine itself: what a TPU cannot do, and VMEM that it does not have, is an error here. That a kernel
compiles says nothing of its results: conformance interprets it for those.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_tpu.chips import CHIPS
from sglang_tpu.hlo import VMEM, Module

SECTION = "kernels"  # of the budget file
MODULES = ("sglang_tpu.attention_aot", "sglang_tpu.aot_matmul", "sglang_tpu.jax_aot")  # each has a tuple AOT
MANY = 4 << 20  # elements, of a tensor whose copies are looked for


@dataclass(frozen=True, kw_only=True, slots=True)
class AotSpec:
    """A kernel at production sizes: a function of arrays, and what it is called with."""

    op: str
    case: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]  # trees of jax.ShapeDtypeStruct
    uncopied: int  # which of them must stay where and as they lie: a pool, weights
    donated: bool = False  # and is changed there
    chips: tuple[str, ...] = tuple(CHIPS)

    @property
    def title(self) -> str:
        return f"{self.op}[{self.case}]"


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Bytes of VMEM that the kernel with the most takes, and of HBM beside arguments and results."""

    vmem: int
    temporary: int


def specs(*only: str) -> list[AotSpec]:
    """Of every module; with `only`, those whose title contains one of them."""
    found = [spec for name in MODULES for spec in importlib.import_module(name).AOT]
    return [spec for spec in found if not only or any(text in spec.title for text in only)]


def compile_spec(spec: AotSpec, chip: str) -> Any:
    """The compiled program (`jax.stages.Compiled`). Raises what the compiler raises."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from sglang_tpu.topology import mesh_of

    mesh = mesh_of(CHIPS[chip], 1, "x")
    placed = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), spec.args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(spec.fn, donate_argnums=spec.uncopied if spec.donated else ()).lower(*args).compile()


def usage_of(compiled: Any) -> Usage:
    """Raises LookupError where the program has no kernel: XLA would have taken over all of it."""
    kernels = [i.vmem for i in Module(compiled.as_text()).instructions if i.target == "tpu_custom_call"]
    if not kernels:
        raise LookupError("no kernel in the program")
    return Usage(vmem=max(kernels), temporary=compiled.memory_analysis().temp_size_in_bytes)


def copies(compiled: Any, spec: AotSpec) -> Iterator[str]:
    """Copies in HBM of what is to stay where it is, in words: a pool or a weight that XLA turns around in every step.

    They are known by their dims, in any order; small tables of a weight's are not looked for.
    """
    import jax

    held = {_known_by(x.shape) for x in jax.tree.leaves(spec.args[spec.uncopied]) if math.prod(x.shape) >= MANY}
    for name, found, layout in re.findall(
        r"%?([\w.-]+) = \(?\w+\[([\d,]+)\](\S*) (?:copy|copy-start|transpose)\(", compiled.as_text()
    ):
        if _known_by(int(d) for d in found.split(",")) in held and f"S({VMEM})" not in layout:
            yield f"{name} copies [{found}]"


def _known_by(dims: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(d for d in dims if d > 1))


def problems(spec: AotSpec, chip: str, budget: Mapping[str, int] | None) -> tuple[Usage | None, list[str]]:
    """What it uses, and what is wrong. `budget`: None where nothing is compared."""
    try:
        compiled = compile_spec(spec, chip)
        used = usage_of(compiled)
    except Exception as e:
        return None, [f"does not compile: {type(e).__name__}: {str(e)[:400]}"]
    wrong = list(copies(compiled, spec))
    if budget is not None:
        if not budget:
            wrong.append("has no budget; run with --write, and look at what it says")
        mine = {"vmem": used.vmem, "temporary": used.temporary}
        wrong += [
            f"{mine[what]} bytes of {what}, and its budget is {most}"
            for what, most in budget.items()
            if mine[what] > most
        ]
    return used, wrong


def examine(
    chosen: Iterable[AotSpec], chips: Iterable[str], budgets: Mapping[str, Any] | None
) -> tuple[Any, list[str]]:
    """-> chip -> title -> bytes, and problems in lines."""
    used: dict[str, dict[str, dict[str, int]]] = {}
    wrong = []
    for spec in chosen:
        for chip in [c for c in chips if c in spec.chips]:
            budget = None if budgets is None else budgets.get(chip, {}).get(spec.title, {})
            found, lines = problems(spec, chip, budget)
            wrong += [f"{chip} {spec.title}: {line}" for line in lines]
            if found is not None:
                used.setdefault(chip, {})[spec.title] = {"vmem": found.vmem, "temporary": found.temporary}
                print(f"{chip} {spec.title}: {found.vmem} bytes of VMEM, {found.temporary} temporary", flush=True)
    return used, wrong


def main(argv: list[str] | None = None) -> int:
    """0: all compiles, within its budgets. 1: not so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS, action="append", help="all by default")
    parser.add_argument("--only", default=[], action="append", metavar="TEXT", help="kernels whose title contains it")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--check", type=Path, metavar="FILE")
    target.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    path = args.check or args.write
    used, wrong = examine(specs(*args.only), args.chip or CHIPS, _read(path).get(SECTION, {}) if args.check else None)
    if args.write:
        whole = _read(path)  # as it is by now
        for chip, of_chip in used.items():
            whole.setdefault(SECTION, {}).setdefault(chip, {}).update(of_chip)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
