"""All bodies, and `load`, which gives them to the dispatcher."""

from __future__ import annotations

from functools import cache

import torch

from sglang_npu_emulation import attention, experts, quantised, rows, stubs  # noqa: F401  their bodies
from sglang_npu_emulation.contract import install


@cache
def load() -> torch.library.Library:
    """torch_npu in this process, over libraries that have no device, and the host's bodies for its ops. Once; raises OSError without the libraries."""
    stubs.load()
    import torch_npu  # noqa: F401  it registers schemas and Meta kernels

    library = torch.library.Library("npu", "IMPL")
    install(library)
    return library
