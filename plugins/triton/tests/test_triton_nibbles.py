"""The assembly that takes codes of four bits apart, which the interpreter does not run, by a model of the instructions it has."""

from __future__ import annotations

import numpy as np
from ptx_model import bf16_pair, numbers, ran
from sglang_triton.nibbles import HALVES


def test_each_byte_becomes_its_two_codes_less_the_zero() -> None:
    """Four neighbouring bytes at a time, all of them; every zero, and 8 where a format has none."""
    codes = (np.arange(0, 256, 4)[:, None] + 7 * np.arange(4)) % 256
    word = (codes << 8 * np.arange(4)).sum(axis=1).astype(np.uint32)
    for zero in range(16):
        less = bf16_pair(-128.0 - zero, -128.0 - zero)
        out = ran(HALVES, {"$4": word, "$5": less, "$6": less})
        low, high = (
            np.concatenate([numbers(out[a]), numbers(out[b])], axis=1) for a, b in (("$0", "$1"), ("$2", "$3"))
        )
        assert np.array_equal(low, (codes & 15) - zero)
        assert np.array_equal(high, (codes >> 4) - zero)
