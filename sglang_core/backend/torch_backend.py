"""`TorchBackend`: the base of a backend whose device PyTorch can address. A subclass says what its probe finds."""

from __future__ import annotations

from sglang_core.backend.interface import Backend, DeviceInfo, DeviceRuntime, RuntimeContext


class TorchBackend(Backend):
    """Runs every op's reference body, eagerly, on `torch_device`: "cpu" or what a PyTorch build names its device."""

    torch_device: str = "cpu"

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        from sglang_core.backend.torch_runtime import TorchRuntime  # torch: not needed to list devices

        return TorchRuntime(ctx, self.torch_device_of(ctx.devices[0]))

    def shared_by_ranks(self, info: DeviceInfo) -> bool:
        return self.torch_device == "cpu"

    def torch_device_of(self, info: DeviceInfo) -> str:
        return self.torch_device if self.torch_device == "cpu" else f"{self.torch_device}:{info.index}"
