"""A model of the PTX instructions that kernels' assembly has: the interpreter runs none of it."""

from __future__ import annotations

import re

import numpy as np
import torch

Register = np.ndarray  # uint32, of many threads


def bf16_pair(low: float, high: float) -> Register:
    """Two numbers as a register holds them."""
    bits = torch.tensor([low, high], dtype=torch.bfloat16).view(torch.uint16).numpy().astype(np.uint32)
    return np.asarray(bits[0] | bits[1] << 16, dtype=np.uint32)


def numbers(register: Register) -> np.ndarray:
    """float64[..., 2], the two bfloat16 of each register: subnormals, infinities and NaN among them."""
    halves = np.stack([register & 0xFFFF, register >> 16], axis=-1).astype(np.uint16)
    return torch.from_numpy(halves).view(torch.bfloat16).double().numpy()


def ran(text: str, registers: dict[str, Register]) -> dict[str, Register]:
    """PTX's own words for what its mov, shr, and, mul.lo, prmt and fma.rn.bf16x2 do. No other instruction is known."""

    def value(name: str) -> Register:
        return registers[name] if name in registers else np.asarray(int(name, 0), dtype=np.uint32)

    def multiply_add(a: str, b: str, c: str) -> Register:
        x, y, z = (numbers(value(name)) for name in (a, b, c))
        with np.errstate(all="ignore"):
            exact = torch.from_numpy(np.asarray(x * y + z))
        bits = exact.to(torch.bfloat16).view(torch.uint16).numpy().astype(np.uint32)
        return bits[..., 0] | bits[..., 1] << 16

    def permuted(a: str, b: str, order: str) -> Register:
        eight = value(a).astype(np.uint64) | value(b).astype(np.uint64) << 32
        places = (int(value(order)) >> 4 * i & 7 for i in range(4))
        return sum(((eight >> 8 * place) & 0xFF) << 8 * i for i, place in enumerate(places)).astype(np.uint32)

    known = {
        "mov.b32": lambda a: value(a),
        "shr.b32": lambda a, b: value(a) >> value(b),
        "and.b32": lambda a, b: value(a) & value(b),
        "mul.lo.u32": lambda a, b: (value(a).astype(np.uint64) * value(b) & 0xFFFFFFFF).astype(np.uint32),
        "prmt.b32": permuted,
        "fma.rn.bf16x2": multiply_add,
    }
    for op, operands in re.findall(r"^([a-z][\w.]+) (.*);$", text, re.MULTILINE):
        target, *sources = operands.split(", ")
        registers[target] = known[op](*sources)
    return registers
