"""Device `acme`: twenty lines that serve every model, and the kernels that have been written so far."""

from sglang_core.api import Claims, DeviceInfo, Kernel, KernelContext, TorchBackend


class AcmeBackend(TorchBackend):
    name = "acme"
    torch_device = "cpu"  # what PyTorch calls the device

    def probe(self) -> list[DeviceInfo]:
        return [DeviceInfo(backend="acme", path="acme/v1", name="Acme One", score=5)]

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        return [Kernel("act.gated", fn="acme.activation:gated", device=("acme",))]

    def claims(self, ctx: KernelContext) -> Claims:
        return Claims.native(["act.gated"], profiles=("base",))
