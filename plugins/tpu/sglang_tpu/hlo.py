"""What a compiled program moves: a reader of XLA's optimised HLO text, scheduled for one TPU core.

XLA's own cost model is made for choosing between fusions and is unreliable on bytes. Here each instruction of the program that reads or
writes HBM counts what it reads and writes, once; what is in vector memory (memory space 1 of a layout) counts nothing. A kernel that reads
parts of its operands, or some of them several times, says so in its metadata.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

READS = "reads"  # in a kernel's metadata: bytes that it reads of each of its operands at most, where that is not all of them
HBM, VMEM, HOST = 0, 1, 5  # memory spaces, as layouts number them
BITS = {"pred": 8, "token": 0, "opaque": 0}
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("copy-done", "slice-done", "async-done", "async-update", "all-reduce-done", "all-gather-done", "collective-permute-done"),
}  # fmt: skip
READS_PART = {"slice", "dynamic-slice", "gather"}
WRITES_PART = {"dynamic-update-slice": 1, "scatter": 2}  # -> which operand is what is written
NO_MOVE = {
    "bitcast",
    "reshape",
    "convert",
    "copy",
}  # between a fusion's parameter or result and what decides how much is moved
HOST_OPS = {"infeed", "outfeed"}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = ")
_TILE = re.compile(r"T\(([\d,*]+)\)")
_SPACE = re.compile(r"S\((\d+)\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ALIASED = re.compile(r"output_to_operand_aliasing=\{(.*?)\}(?:, [a-z]|$)")
_SCOPED = re.compile(r'"used_scoped_memory_configs":(\[[^\]]*\])')
_METADATA = re.compile(r"kernel_metadata=\{\n(.*?)\n\}", re.DOTALL)
_READS = re.compile(rf'"{READS}":"(\[[\d, ]*\])"')
_CALLEE = re.compile(r"(?:calls|body|to_apply|branch_computations|called_computations)=\{?(%[\w.-]+(?:, %[\w.-]+)*)\}?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """A buffer: bytes with the padding of its tiles, and the memory it is in."""

    nbytes: int
    space: int

    @property
    def hbm(self) -> int:
        return self.nbytes if self.space == HBM else 0


@dataclass(frozen=True, kw_only=True)
class Instruction:
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # what it gives
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def callees(self) -> list[str]:
        found = _CALLEE.search(self.attributes)
        return [] if found is None else [name.lstrip("%") for name in found[1].split(", ")]

    @property
    def target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return "" if found is None else found[1]

    @property
    def vmem(self) -> int:
        """Bytes of vector memory up to the end of what it has for itself: below lies what several instructions share."""
        found = _SCOPED.search(self.attributes)
        scopes = [] if found is None else json.loads(found[1])
        return sum(int(scope["size"]) for scope in scopes if int(scope["memory_space"]) == VMEM)


@dataclass(frozen=True, kw_only=True)
class Computation:
    instructions: Mapping[str, Instruction]

    @cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for each in self.instructions.values():
            for operand in each.operands:
                found[operand].append(each)
        return found

    @cached_property
    def parameters(self) -> list[Instruction]:
        of = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(of, key=lambda i: int(i.attributes))

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)


class Module:
    """The text of a compiled program (`jax.stages.Compiled.as_text`)."""

    def __init__(self, text: str) -> None:
        text = _METADATA.sub(lambda found: f"kernel_metadata={{{found[1]}}}", text)  # printed on lines of its own
        self.header = text.partition("\n")[0]
        self.computations: dict[str, Computation] = {}
        body: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and "->" in line:
                entry, name = line.startswith("ENTRY "), line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                body = {}
                self.computations[name] = Computation(instructions=body)
                if entry:
                    self.entry = name
            elif (found := _LINE.match(line)) is not None:
                body[found[2]] = _instruction(found[2], line[found.end() :], is_root=found[1] is not None)

    @cached_property
    def instructions(self) -> list[Instruction]:
        """Of every computation."""
        return [i for c in self.computations.values() for i in c.instructions.values()]

    def num_aliased(self) -> int:
        """How many of the program's results are arguments of it, changed where they are."""
        return self.header.count("may-alias") + self.header.count("must-alias")

    def host_transfers(self) -> list[str]:
        """Instructions by which the program and the host would wait for each other, in words."""
        return [f"{i.opcode} {i.name} {i.target}".strip() for i in self.instructions if _meets_host(i)]

    def vmem(self) -> int:
        """Bytes of vector memory, of the instruction that takes most."""
        return max(i.vmem for i in self.instructions)

    def traffic(self) -> dict[str, int]:
        """Bytes read from and written to HBM in one run, by instruction of the entry computation."""
        moved = {name: self._moved(self.computations[self.entry], i) for name, i in self._entry().items()}
        return {name: n for name, n in moved.items() if n}

    def _entry(self) -> Mapping[str, Instruction]:
        return self.computations[self.entry].instructions

    def _moved(self, where: Computation, i: Instruction) -> int:
        if i.opcode in FREE:
            return 0
        if i.opcode in ("while", "conditional", "call", "async-start"):
            inner = [sum(self._moved(c, j) for j in c.instructions.values()) for c in self._called(i)]
            trips = _TRIPS.search(i.attributes)
            return max(inner) * (int(trips[1]) if trips else 1)
        if i.opcode == "fusion":
            return self._moved_by_fusion(where, i)
        read = [a for name in i.operands for a in where.instructions[name].arrays]
        match i.opcode:
            case "copy-start" if _is_for_first_run(where, i):
                return 0
            case "copy-start":  # gives its destination, its source, a flag
                return i.arrays[0].hbm + i.arrays[1].hbm
            case "slice-start":  # gives its source, the slice, a flag
                _, part, *_ = i.arrays
                return part.hbm + (part.nbytes if read[0].space == HBM else 0)
            case opcode if opcode in READS_PART:
                part = i.arrays[0]
                return part.hbm + (part.nbytes if read[0].space == HBM else 0)
            case opcode if opcode in WRITES_PART:
                part = read[WRITES_PART[opcode]]
                return part.hbm + (part.nbytes if i.arrays[0].space == HBM else 0)
        # A copy of a kernel's result inherits what the kernel says.
        stated = _READS.search(i.attributes) if i.opcode == "custom-call" else None
        taken = [a.nbytes for a in read] if stated is None else json.loads(stated[1])
        total: int = sum(n for n, a in zip(taken, read, strict=True) if a.space == HBM)
        return total + sum(a.hbm for n, a in enumerate(i.arrays) if n not in _aliased(i))

    def _called(self, i: Instruction) -> list[Computation]:
        return [self.computations[name] for name in i.callees]

    def _moved_by_fusion(self, where: Computation, i: Instruction) -> int:
        (inside,) = self._called(i)
        read = [where.instructions[name].arrays[0] for name in i.operands]
        total = sum(a.space == HBM and self._read(inside, p) for a, p in zip(read, inside.parameters, strict=True))
        results = inside.root.operands if inside.root.opcode == "tuple" else (inside.root.name,)
        if len(results) < len(i.arrays):  # an operator that gives several, as a reduction to a maximum and its index
            return total + sum(a.hbm for a in i.arrays)
        for name, a in zip(results, i.arrays, strict=True):
            total += a.space == HBM and self._written(inside, inside.instructions[name])
        return total

    def _read(self, inside: Computation, parameter: Instruction) -> int:
        """Bytes that a fusion reads of a parameter: parts of it where only parts are looked at, nothing of what it only writes into."""
        total, seen = 0, [parameter]
        while seen:
            value = seen.pop()
            for user in inside.users[value.name]:
                if user.opcode in READS_PART and user.operands[0] == value.name:
                    total += user.arrays[0].nbytes
                elif user.opcode in WRITES_PART and user.operands[0] == value.name:
                    continue
                elif user.opcode in NO_MOVE and not user.is_root:
                    seen.append(user)
                elif user.opcode == "fusion":
                    (inner,) = self._called(user)
                    total += self._read(inner, inner.parameters[user.operands.index(value.name)])
                else:
                    return parameter.arrays[0].nbytes
        return min(total, parameter.arrays[0].nbytes)

    def _written(self, inside: Computation, value: Instruction) -> int:
        """Bytes that a fusion writes of a result: a part where it is a parameter that was changed in part."""
        origin = value
        while origin.opcode in NO_MOVE:
            origin = inside.instructions[origin.operands[0]]
        if origin.opcode in WRITES_PART:
            return inside.instructions[origin.operands[WRITES_PART[origin.opcode]]].arrays[0].nbytes
        if origin.opcode == "fusion":
            (inner,) = self._called(origin)
            return self._written(inner, inner.root)
        return 0 if origin.opcode == "parameter" and origin is value else value.arrays[0].nbytes


def _is_for_first_run(where: Computation, i: Instruction) -> bool:
    """Whether it brings what each run brings for the next by a copy at its end. Without one it stays in vector memory, until another program runs."""
    if "cross_program_prefetch_index" not in i.attributes:
        return False
    return any(user.opcode == "copy-start" and user is not i for user in where.users[i.operands[0]])


def _meets_host(i: Instruction) -> bool:
    if i.opcode in HOST_OPS or "is_host_transfer=true" in i.attributes or "host" in i.target.lower():
        return True
    return "callback" in i.target or any(a.space == HOST for a in i.arrays)


def _aliased(i: Instruction) -> set[int]:
    """Which of an instruction's results are operands of it, changed where they are."""
    found = _ALIASED.search(i.attributes)
    pairs = re.findall(r"\{(\d*)\}: \(", found[1]) if found else []
    return {int(n or 0) for n in pairs}


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    shape, rest = _balanced(text) if text.startswith("(") else text.split(" ", 1)
    opcode, _, rest = rest.lstrip().partition("(")
    operands, attributes = _balanced("(" + rest)
    if opcode == "parameter":
        return Instruction(
            name=name,
            opcode=opcode,
            arrays=tuple(_arrays(shape)),
            operands=(),
            attributes=operands[1:-1],
            is_root=is_root,
        )
    return Instruction(
        name=name,
        opcode=opcode,
        arrays=tuple(_arrays(shape)),
        operands=tuple(re.findall(r"%([\w.-]+)", operands)),
        attributes=attributes,
        is_root=is_root,
    )


def _balanced(text: str) -> tuple[str, str]:
    """What is in the parentheses that `text` begins with, they included, and the rest."""
    depth = 0
    for at, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[: at + 1], text[at + 1 :]
    raise ValueError(f"parentheses do not close in {text[:80]!r}")


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        space = _SPACE.search(layout)
        sizes = _padded([int(d) for d in dims.split(",") if d], layout)
        yield Array(nbytes=math.prod(sizes) * _bits(dtype) // 8, space=int(space[1]) if space else HBM)


def _padded(sizes: list[int], layout: str) -> list[int]:
    """Dimensions rounded up to the first tile of a layout like `1,0:T(8,128)(2,1)`: minor dimensions first, then tiles."""
    tile = _TILE.search(layout)
    if tile is None or not sizes:
        return sizes
    minor_first = [int(d) for d in layout.partition(":")[0].split(",")]
    sizes = list(sizes)
    for dim, step in zip(minor_first, reversed(tile[1].split(",")), strict=False):
        if step != "*":
            sizes[dim] = -(-sizes[dim] // int(step)) * int(step)
    return sizes


def _bits(dtype: str) -> int:
    if dtype in BITS:
        return BITS[dtype]
    found = re.search(r"\d+", dtype)
    assert found is not None, f"an element type {dtype!r}"
    return int(found[0])
