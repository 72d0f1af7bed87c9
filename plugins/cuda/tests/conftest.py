"""Triton's kernels run through its interpreter here: set before triton is first imported, which is when it is read."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from sglang_triton.interpreter import quicken

quicken()
