"""What a GPU's backend claims: the provider's kernels, and a runtime that captures steps. Imports no torch."""

from __future__ import annotations

from sglang_core.api import Claim, Claims, Support
from sglang_triton.kernels import DTYPES, KERNELS

PROFILES = ("base", "odd_sizes", "graph", "buckets", "comm", "e2e")


def claims() -> Claims:
    """Of the ops that no kernel is for, only float16 is refused, which their bodies were never checked with."""
    native = [Claim(op=op, dtypes=DTYPES) for op in dict.fromkeys(kernel.op for kernel in KERNELS)]
    return Claims((*native, Claim(op="*", dtypes=("float16",), support=Support.UNSUPPORTED)), profiles=PROFILES)
