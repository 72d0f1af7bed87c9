"""Writes the parts of docs/ops.md that follow from the definitions. `--check` only says whether they are up to date.

usage: python tools/ops_docs.py [--check]
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from types import ModuleType
from typing import Literal, get_args, get_origin

from marked_docs import main

from sglang_core.api import ops as exported
from sglang_core.api.lock import signature
from sglang_core.ops import formats
from sglang_core.ops.registry import OPS, OpDef
from sglang_core.ops.weight import PackedWeight

WIDTH = 100  # of a signature on one line


def index() -> str:
    """Every op by family, with what selection knows of it."""
    lines = ["| op | defined in | kind | where a kernel refuses what is claimed |", "|---|---|---|---|"]
    for name, op in sorted(OPS.items()):
        kind = "weighted" if op.weighted else "host" if op.host else ""
        if op.parts:
            kind = f"composite of {', '.join(f'`{part}`' for part in op.parts.values())}"
        row = (
            f"[`{name}`](#{anchor(name)})",
            f"`{file_of(module_of(op))}`",
            kind,
            "an error" if op.strict else "a warning",
        )
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def families() -> str:
    """A section a family: what its files say, its ops, and the dataclasses that they take."""
    lines: list[str] = []
    told: set[str] = set()
    for family in sorted({op.family for op in OPS.values()}):
        ops = [op for op in OPS.values() if op.family == family]
        modules = {module_of(op).__name__: module_of(op) for op in ops}
        new = [module for name, module in modules.items() if name not in told]
        told |= modules.keys()
        lines += [f"## {family}", ""]
        for module in new:
            lines += [f"**`{file_of(module)}`** {inspect.cleandoc(module.__doc__ or '')}", ""]
        for op in ops:
            lines += [*describe_op(op), ""]
        for module in new:
            for cls in dataclasses_of(module):
                lines += [*describe_dataclass(cls), ""]
    return "\n".join(lines[:-1])


def weight_formats() -> str:
    """What `formats.py` says, and the class that holds such a weight."""
    text = re.sub(r"\|\n  +", "| ", inspect.cleandoc(formats.__doc__ or ""))  # a row of the table over two lines
    return f"{text}\n\n### PackedWeight\n\n{inspect.getdoc(PackedWeight)}"


def module_of(op: OpDef) -> ModuleType:
    return sys.modules[op.body.__module__]


def file_of(module: ModuleType) -> str:
    return f"ops/{module.__name__.rpartition('.')[2]}.py"


def anchor(name: str) -> str:
    """Where a heading of this text is: dots are dropped."""
    return name.replace(".", "").lower()


def describe_op(op: OpDef) -> Iterator[str]:
    facts = ["It takes weights in any of the formats below."] if op.weighted else []
    if op.parts:
        facts.append(f"It is a composite of {', '.join(f'`{part}`' for part in op.parts.values())}.")
    for name in re.findall(r"\b[A-Z]\w+", signature(op.body)):
        if values := choices(module_of(op), name):
            facts.append(f"`{name}` is {values}.")
    yield f"### {op.name}"
    yield ""
    yield from ("```python", wrapped(f"def {op.body.__name__}{signature(op.body)}"), "```", "")
    yield inspect.getdoc(op.body) or ""
    if facts:
        yield ""
        yield " ".join(facts)


def wrapped(definition: str) -> str:
    """A signature on one line if it fits, else a parameter a line."""
    if len(definition) <= WIDTH:
        return definition
    head, _, rest = definition.partition("(")
    inside, _, result = rest.rpartition(")")
    parameters, depth = [""], 0
    for c in inside:
        depth += (c in "([") - (c in ")]")
        if c == "," and depth == 0:
            parameters.append("")
        else:
            parameters[-1] += c
    lines = "".join(f"    {parameter.strip()},\n" for parameter in parameters)
    return f"{head}(\n{lines}){result}"


def dataclasses_of(module: ModuleType) -> list[type]:
    """Those that plugins may import, in the order of the file."""
    names = [node.name for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)]
    return [c for c in (getattr(module, n) for n in names if n in exported.__all__) if dataclasses.is_dataclass(c)]


def describe_dataclass(cls: type) -> Iterator[str]:
    """Its docstring, and its fields with what is written beside them."""
    beside = comments(cls)
    yield f"### {cls.__name__}"
    yield ""
    yield inspect.getdoc(cls) or ""
    yield ""
    yield "| field | type | default | |"
    yield "|---|---|---|---|"
    for f in dataclasses.fields(cls):
        default = "" if f.default is dataclasses.MISSING else f"`{f.default!r}`"
        kind = choices(sys.modules[cls.__module__], str(f.type)) or f"`{f.type}`"
        row = (f"`{f.name}`", kind, default, beside.get(f.name, ""))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def choices(module: ModuleType, name: str) -> str:
    """The values of a Literal that the module knows by this name; "" where it is none."""
    alias = getattr(module, name, None)
    return " or ".join(f"`{value!r}`" for value in get_args(alias)) if get_origin(alias) is Literal else ""


def comments(cls: type) -> dict[str, str]:
    """Field -> the comment at the end of its line."""
    source = inspect.getsource(cls)
    at_line = {
        t.start[0]: t.string
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }
    found = {}
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = [at_line[n] for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in at_line]
            found[node.target.id] = " ".join(t.removeprefix("#").strip() for t in text)
    return found


PARTS = {"index": index, "families": families, "formats": weight_formats}


if __name__ == "__main__":
    sys.exit(main("ops.md", "ops_docs.py", PARTS))
