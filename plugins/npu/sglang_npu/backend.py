"""`NpuBackend`: Ascend NPUs of the Atlas A2 and A3 series. Importing it opens no device and imports neither torch nor torch_npu."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang_core.api import (
    Backend,
    Claims,
    DefaultsContext,
    DeviceInfo,
    DeviceRuntime,
    Kernel,
    KernelContext,
    RuntimeContext,
)
from sglang_npu import dcmi, triton_ascend
from sglang_npu.kernels import KERNELS, claims

INSTALL = "pip install 'sglang-npu[npu]'"
SERIES = ("910B", "910_93")  # Atlas A2, Atlas A3: the chips that the fused ops used here are documented for
PAGE = 128  # what the vendor recommends; longer queries attend over multiples of it alone


class NpuBackend(Backend):
    """A device for each NPU that ASCEND_RT_VISIBLE_DEVICES leaves."""

    name = "npu"

    def probe(self) -> list[DeviceInfo]:
        machine = dcmi.read()
        if machine is None:
            return []
        versions = {"driver": machine.driver, "torch_npu": _installed() or "none"}
        return [self._info(i, chip, versions) for i, chip in enumerate(dcmi.visible(machine.chips))]

    def _info(self, index: int, chip: str, versions: dict[str, str]) -> DeviceInfo:
        problem = "" if _installed() else f"torch_npu is not installed; {INSTALL}, beside CANN"
        if not chip.removeprefix("Ascend").startswith(SERIES):
            problem = f"kernels are for the Atlas A2 and A3 series ({', '.join(SERIES)}), and this is {chip}; take --device cpu"
        return DeviceInfo(
            backend=self.name,
            index=index,
            path=f"npu/{chip.lower()}",
            name=f"Ascend {chip.removeprefix('Ascend')}",
            score=200,
            versions=versions,
            problem=problem,
        )

    def absent_reason(self) -> str:
        machine = dcmi.read()
        if machine is None:
            return f"no Ascend driver answers ({dcmi.DRIVER}): install it, or give the container its NPUs"
        if machine.chips:
            return f"ASCEND_RT_VISIBLE_DEVICES leaves none of the {len(machine.chips)} NPUs here; unset it, or list one"
        return "the Ascend driver finds no NPU"

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        from sglang_npu.driver import NpuDriver  # torch_npu: not needed to list devices
        from sglang_npu.runtime import NpuRuntime

        return NpuRuntime(ctx, NpuDriver(ctx.devices[0].index))

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        return [*KERNELS, *triton_ascend.kernels()]

    def claims(self, ctx: KernelContext) -> Claims:
        return claims()

    def config_defaults(self, ctx: DefaultsContext) -> dict[str, Any]:
        return {"dtype": "bfloat16", "page_size": PAGE, "chunked_prefill_size": 4096}


def _installed() -> str | None:
    try:
        return version("torch_npu")
    except PackageNotFoundError:
        return None
