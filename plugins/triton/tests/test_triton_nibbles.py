"""The assembly that takes codes of four bits apart, which the interpreter does not run, by a model of the instructions it has."""

from __future__ import annotations

import re

import numpy as np
import torch
from sglang_triton.nibbles import HALVES


def bf16_pair(low: float, high: float) -> int:
    """Two numbers as a register holds them."""
    bits = torch.tensor([low, high], dtype=torch.bfloat16).view(torch.uint16).tolist()
    return int(bits[0] | bits[1] << 16)


def numbers(register: int) -> list[float]:
    halves = np.array([register & 0xFFFF, register >> 16], dtype=np.uint16)
    return torch.from_numpy(halves).view(torch.bfloat16).float().tolist()


def ran(text: str, registers: dict[str, int]) -> dict[str, int]:
    """PTX's own words for what its mov, shr, and, prmt and fma.rn.bf16x2 do. No other instruction is known."""

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def multiply_add(a: str, b: str, c: str) -> int:
        parts = (numbers(value(name)) for name in (a, b, c))
        return bf16_pair(*(x * y + z for x, y, z in zip(*parts, strict=True)))

    def permuted(a: str, b: str, order: str) -> int:
        eight = value(a) | value(b) << 32
        return sum(((eight >> 8 * (value(order) >> 4 * i & 7)) & 0xFF) << 8 * i for i in range(4))

    known = {
        "mov.b32": lambda a: value(a),
        "shr.b32": lambda a, b: value(a) >> value(b),
        "and.b32": lambda a, b: value(a) & value(b),
        "prmt.b32": permuted,
        "fma.rn.bf16x2": multiply_add,
    }
    for op, operands in re.findall(r"^([a-z][\w.]+) (.*);$", text, re.MULTILINE):
        target, *sources = operands.split(", ")
        registers[target] = known[op](*sources)
    return registers


def test_each_byte_becomes_its_two_codes_less_the_zero() -> None:
    """Four neighbouring bytes at a time, all of them; every zero, and 8 where a format has none."""
    for zero in range(16):
        less = bf16_pair(-128.0 - zero, -128.0 - zero)
        for first in range(0, 256, 4):
            codes = [(first + 7 * i) % 256 for i in range(4)]
            word = int.from_bytes(bytes(codes), "little")
            out = ran(HALVES, {"$4": word, "$5": less, "$6": less})
            low, high = (numbers(out[a]) + numbers(out[b]) for a, b in (("$0", "$1"), ("$2", "$3")))
            assert low == [float((code & 15) - zero) for code in codes]
            assert high == [float((code >> 4) - zero) for code in codes]
