"""Kernels run through Triton's interpreter here: set before triton is first imported, which is when it is read."""

import os

os.environ["TRITON_INTERPRET"] = "1"
