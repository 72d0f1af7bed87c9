"""`TritonBackend`: host tensors through Triton's interpreter, so that conformance holds every kernel on a machine without a GPU.

Its kernels are those of the provider. Importing it imports neither torch nor triton.
"""

from __future__ import annotations

import os

from sglang_core.api import (
    Claims,
    DeviceInfo,
    DeviceRuntime,
    KernelContext,
    RuntimeContext,
    TorchBackend,
)
from sglang_triton import compiler
from sglang_triton.kernels import claims

SWITCH = "TRITON_INTERPRET"  # Triton's own: it reads it as it is imported
PROFILES = ("base",)


class TritonBackend(TorchBackend):
    """One device, which no model is served on: `emulated` in its facts, and a score that `--device auto` never takes."""

    name = "triton"
    torch_device = "cpu"

    def probe(self) -> list[DeviceInfo]:
        if os.environ.get(SWITCH) != "1":
            return []
        versions = compiler.installed()
        if not versions:
            return []
        facts = {"emulated": True}
        return [
            DeviceInfo(
                backend=self.name,
                path="triton/interpreter",
                name="Triton's interpreter",
                score=-1,
                facts=facts,
                total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                versions=versions,
            )
        ]

    def absent_reason(self) -> str:
        return f"it interprets Triton kernels on the host, for tests; set {SWITCH}=1, with `pip install triton`"

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        from sglang_triton.interpreter import quicken  # triton: not needed to list devices

        quicken()
        return super().create_runtime(ctx)

    def claims(self, ctx: KernelContext) -> Claims:
        return claims(PROFILES)
