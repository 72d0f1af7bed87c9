"""The built-in backend `cpu`: no kernels, every op runs its reference body. It enters by the same door as any plugin."""

from __future__ import annotations

import platform
from typing import Any

import psutil

from sglang_core.backend.claims import Claim, Claims, Support
from sglang_core.backend.interface import DefaultsContext, DeviceInfo, KernelContext
from sglang_core.backend.torch_backend import TorchBackend


class CpuBackend(TorchBackend):
    """The host, in float32 or bfloat16. The oracle that other backends are compared with, so slow and plain."""

    name = "cpu"

    def probe(self) -> list[DeviceInfo]:
        name = f"{psutil.cpu_count(logical=False) or psutil.cpu_count() or 1} cores, {platform.machine()}"
        memory, versions = psutil.virtual_memory().total, {platform.system(): platform.release()}
        return [DeviceInfo(backend=self.name, path="cpu", name=name, total_memory=memory, versions=versions)]

    def claims(self, ctx: KernelContext) -> Claims:
        """Float16 overflows in bodies that were never checked with it, and gains nothing on a host."""
        return Claims(
            (Claim(op="*", dtypes=("float16",), support=Support.UNSUPPORTED),),
            profiles=("base", "graph", "comm", "e2e"),
        )

    def config_defaults(self, ctx: DefaultsContext) -> dict[str, Any]:
        stored = ctx.model.get("dtype", ctx.model.get("torch_dtype"))
        return {"dtype": "float32"} if stored == "float16" else {}
