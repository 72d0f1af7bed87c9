"""What the machine code of compiled kernels bounds, with no device: widths of loads, instructions a byte, programs a processor.

    python -m sglang_triton.sass --only norm            # every loop, and what is outside of them
    python -m sglang_triton.sass --only gemm --config BLOCK_N=64 num_warps=8

Rates are of an H200's processor a cycle (`PIPES`, `BANDWIDTH`), from NVIDIA's tables of throughput. The last figure of a line is what the busiest pipe leaves
of bandwidth, or of the tensor cores where there are products, if nothing else ever waits. It is a limit and no prediction: latency, caches, bank
conflicts and what is predicated off are not seen, and each byte that a thread asks for is counted, whether or not another one asks for it too. Memory
of that rate and a latency of 800 ns wants 25 KB in flight on a processor, of all its programs together; how many it gets is the launch's matter.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_triton import aot
from sglang_triton.aot_spec import AotSpec

WARP = 32
BANDWIDTH = 17.0  # bytes a cycle: 4.2 TB/s of copies, 132 processors of 1.85 GHz
ISSUES = 4  # instructions of warps a cycle, of all pipes together
# What a processor has; a program takes 1 KiB of shared memory more than it asks for.
SHARED, REGISTERS, WARPS, PROGRAMS = 228 << 10, 64 << 10, 64, 32

# Lanes a cycle. The first pattern that matches an opcode names its pipe; what matches none takes a slot of issue and no more.
PIPES = {
    "tensor": (0, r"(H|Q|I)(G)?MMA\b"),
    "xu": (16, r"MUFU|F2I|I2F\b|F2F\b|POPC|FLO|BREV|REDUX"),
    "lsu": (32, r"LDG|STG|LDS|STS|LDSM|STSM|LDL|STL|SHFL|ATOM|RED\b|LD\b|ST\b"),
    "fma": (128, r"FFMA|FMUL|FADD|HFMA2|HMUL2|HADD2"),
    "imad": (64, r"IMAD"),
    "alu": (
        64,
        r"IADD|LOP|SHF|PRMT|[IFH]SETP|[IF]?SEL\b|FMNMX|LEA|VIADD|VIMNMX|I2FP|F2FP|PLOP|MOV\b|SGXT|IABS|CS2R|HSET|HMNMX|I2IP|P2R|BMSK",
    ),
}
CONVERSIONS = re.compile(r"I2FP?\b|F2FP?\b|F2I")
# Multiply-adds a cycle of dense products, by the bits of what is multiplied. `HMMA` and `IMMA`, of a warp each, reach some two thirds of it on Hopper.
PRODUCTS = {16: 2048, 8: 4096}

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"^(\.L_x_\d+):")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Instructions of one thread: one turn of a loop that has no other in it, or all that is in none."""

    name: str
    opcodes: tuple[str, ...]

    def widths(self, *names: str) -> Counter[int]:
        """Bytes of an access -> how many there are, of opcodes that begin so."""
        return Counter(_bytes(op) for op in self.opcodes if op.split(".")[0] in names)

    @property
    def moved(self) -> int:
        """Bytes from and to global memory."""
        return sum(width * n for width, n in self.widths("LDG", "LDGSTS", "STG").items())

    @property
    def pipes(self) -> Counter[str]:
        found = Counter(_pipe(op) for op in self.opcodes)
        del found[""]
        return found

    @property
    def tensor_cycles(self) -> float:
        """Of a processor, for one warp's share."""
        return sum(_products(op) for op in self.opcodes)

    @property
    def cycles(self) -> dict[str, float]:
        """Of a processor for one warp, by what it waits for: issue slots, and each pipe."""
        lanes = {name: WARP * n / PIPES[name][0] for name, n in self.pipes.items() if name != "tensor"}
        return {"issue": len(self.opcodes) / ISSUES, **lanes, "tensor": self.tensor_cycles}

    @property
    def busiest(self) -> str:
        return max(self.cycles, key=lambda name: self.cycles[name])

    @property
    def limits(self) -> Iterator[str]:
        """What the busiest pipe leaves of bandwidth, and of the tensor cores where there are products."""
        longest = self.cycles[self.busiest]
        if self.moved:
            yield f"{WARP * self.moved / longest:.1f} bytes a cycle of {BANDWIDTH:.0f}"
        if self.tensor_cycles:
            yield f"{self.tensor_cycles / longest:.0%} of tensor cores"


def _bytes(opcode: str) -> int:
    parts = opcode.split(".")
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((sizes[part] for part in parts if part in sizes), 4)


def _pipe(opcode: str) -> str:
    return next((name for name, (_, pattern) in PIPES.items() if re.match(pattern, opcode)), "")


def _products(opcode: str) -> float:
    """Cycles of the tensor cores for one warp: `HMMA.16816` is 16 x 8 x 16, `HGMMA.64x128x16` that of four warps."""
    kind, *parts = opcode.split(".")
    if kind not in ("HMMA", "IMMA", "QMMA", "HGMMA", "QGMMA", "IGMMA"):
        return 0.0
    bits = 16 if kind[0] == "H" else 8
    wide = next((part for part in parts if re.fullmatch(r"\d+x\d+x\d+", part)), None)
    if wide:
        m, n, k = (int(text) for text in wide.split("x"))
        return m * n * k / 4 / PRODUCTS[bits]
    shape = next(part for part in parts if re.fullmatch(r"\d{3,5}", part))
    return 16 * 8 * int(shape[3:]) / PRODUCTS[bits]


def parts_of(listing: str) -> Iterator[Part]:
    """Of `nvdisasm -c`: innermost loops in their order, then what is in no loop that is innermost."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := INSTRUCTION.search(line):
            if found[1].startswith("BRA") and (target := TARGET.search(found[2])):
                jumps.append((len(opcodes), target[1]))
            opcodes.append(found[1])
    backward = {(labels[target], at + 1) for at, target in jumps if target in labels and labels[target] < at}
    loops = [
        loop
        for loop in sorted(backward)
        if not any(o != loop and loop[0] <= o[0] and o[1] <= loop[1] for o in backward)
    ]
    for i, (first, last) in enumerate(loops):
        yield Part(name=f"loop {i}", opcodes=tuple(opcodes[first:last]))
    inside = {i for first, last in loops for i in range(first, last)}
    yield Part(name="rest", opcodes=tuple(op for i, op in enumerate(opcodes) if i not in inside and op != "NOP"))


def programs_per_processor(registers: int, shared: int, warps: int) -> int:
    """By registers (handed out to warps in steps of 256), shared memory and warps."""
    of_warp = -(-registers * WARP // 256) * 256
    return min(REGISTERS // of_warp // warps, SHARED // (shared + 1024), WARPS // warps, PROGRAMS)


def disassembled(cubin: bytes) -> str:
    """By the `nvdisasm` of Triton's package."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def lines(spec: AotSpec, arch: str) -> Iterator[str]:
    """A kernel's line, and one for each part that moves bytes or multiplies."""
    made = aot.compiled(spec, arch)
    usage, warps, stages = aot.usage_of(made, arch), made.metadata.num_warps, made.metadata.num_stages
    programs = programs_per_processor(usage.registers, usage.shared, warps)
    yield (
        f"{spec.title}: {usage.registers} registers, {usage.spills} bytes spilled, {usage.shared} bytes shared, {warps} warps;"
        f" {programs} programs a processor"
    )
    for part in parts_of(disassembled(made.asm["cubin"])):
        if not part.moved and not part.tensor_cycles:
            continue
        copies = part.widths("LDGSTS")
        ahead = max(1, stages - 1) if copies else 1
        read = sum(width * n for width, n in (part.widths("LDG") + copies).items())
        flying = warps * WARP * read * ahead
        widths = {"load": part.widths("LDG"), "copy": copies, "store": part.widths("STG")}
        access = ", ".join(f"{n} {_counts(found)}" for n, found in widths.items() if found) or "no bytes"
        pipes = ", ".join(f"{name} {n}" for name, n in sorted(part.pipes.items()))
        conversions = sum(1 for op in part.opcodes if CONVERSIONS.match(op))
        yield (
            f"  {part.name}: {len(part.opcodes)} instructions ({pipes}; {conversions} conversions); {access};"
            f" {flying / 1000:.1f} KB in flight a program;"
            f" {', '.join(part.limits)} by {part.busiest}"
        )


def _counts(widths: Counter[int]) -> str:
    return " + ".join(f"{n} x {width}" for width, n in sorted(widths.items(), reverse=True))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sglang_triton.sass", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", default="sm_90", help="an architecture of NVIDIA; rates are those of sm_90 whatever it is"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels whose title contains TEXT")
    parser.add_argument("--config", nargs="+", default=[], metavar="NAME=N", help="in place of what the config says")
    args = parser.parse_args(argv)
    instead = {name: int(value) for name, value in (text.split("=") for text in args.config)}
    for spec in aot.specs(args.only):
        if spec.archs and args.arch not in spec.archs:
            continue
        if instead:
            config = {**spec.config(args.arch), **instead}
            spec = replace(spec, fixed=config, name=f"{spec.name}, {' '.join(args.config)}")
        for line in lines(spec, args.arch):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
