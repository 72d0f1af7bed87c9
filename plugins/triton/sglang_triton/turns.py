"""How a kernel begins that may be set up before the one ahead of it has ended (`pdl`): PTX's `griddepcontrol`, which does nothing in other launches.

Until `take_turn` returns, a kernel reads and writes nothing that another one writes or reads. So the order of a stream holds as ever: what is launched in
the ordinary way waits for the end of the kernel ahead, which had itself waited for the end of all before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_triton.pdl import asked

PDL = tl.constexpr(asked())
LINE = tl.constexpr(128)  # bytes that one prefetch brings
AHEAD = tl.constexpr(64 << 10)  # bytes: about what memory gives a processor in the 2 us that a short kernel takes


@triton.jit
def take_turn():
    """The next kernel may be set up from here on. This one goes on when all before it have ended and what they wrote is there."""
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
        tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fetch_ahead(row, NBYTES: tl.constexpr):
    """row: pointers [N] to rows of NBYTES of a weight, which no kernel writes. While others end, their first AHEAD bytes go into the L2 cache."""
    if PDL:
        lines: tl.constexpr = AHEAD // row.shape[0] // LINE
        at = tl.minimum(tl.arange(0, lines) * LINE, NBYTES - 1)
        byte = row.to(tl.pointer_type(tl.uint8))[:, None] + at[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // $0", "=r,l", [byte], dtype=tl.int32, is_pure=False, pack=1
        )
