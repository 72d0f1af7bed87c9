"""`EmulatedRuntime`: the runtime of NPUs over a driver that is the host, and gloo in place of HCCL."""

from __future__ import annotations

from sglang_npu.runtime import NpuRuntime

from sglang_core.api import RuntimeContext
from sglang_npu_emulation.driver import HostDriver


class EmulatedRuntime(NpuRuntime):
    collectives = "gloo"

    def __init__(self, ctx: RuntimeContext) -> None:
        super().__init__(ctx, HostDriver())
