"""The backend `strict`: the host posing as a device that compiles its steps, so that a misuse of the API fails on a laptop."""

from __future__ import annotations

import platform
from typing import Any

import psutil

from sglang_core.backend.claims import Claims
from sglang_core.backend.interface import DefaultsContext, DeviceInfo, DeviceRuntime, KernelContext, RuntimeContext
from sglang_core.backend.torch_backend import TorchBackend


class StrictBackend(TorchBackend):
    """Runs reference bodies like `cpu`, after checking every step against the rules in `strict_trace` and `strict_runtime`."""

    name = "strict"

    def probe(self) -> list[DeviceInfo]:
        """Scores below every real device, so that `auto` never takes it."""
        memory, versions = psutil.virtual_memory().total, {platform.system(): platform.release()}
        info = DeviceInfo(
            backend=self.name,
            path="strict",
            name="checks every step",
            score=-1,
            total_memory=memory,
            versions=versions,
        )
        return [info]

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        from sglang_core.backend.strict_runtime import StrictRuntime  # torch: not needed to list devices

        return StrictRuntime(ctx)

    def claims(self, ctx: KernelContext) -> Claims:
        return Claims(profiles=("base", "graph", "comm", "e2e"))

    def config_defaults(self, ctx: DefaultsContext) -> dict[str, Any]:
        """Small buckets: a trace costs with the ops in it, and reference attention runs one set per tile of queries."""
        return {"max_running_requests": 8, "chunked_prefill_size": 64}
