"""`TpuBackend`: Google TPUs, and the host CPU as JAX sees it. Importing it imports neither jax nor torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sglang_core.api import (
    Backend,
    Claims,
    DefaultsContext,
    DeviceError,
    DeviceInfo,
    DeviceRuntime,
    Kernel,
    KernelContext,
    MeshContext,
    RuntimeContext,
)
from sglang_tpu import chips, jax_kernels
from sglang_tpu.kernels import DTYPES, KERNELS, claims

TESTED = (  # formats of weights that the suite has cases of
    *("fp8.tensor", "fp8.tensor.static", "fp8.token_channel", "fp8.block128"),
    *("int8.token_channel", "int8.token_channel.asym"),
    *("int4.awq.g32", "int4.awq.g128", "int4.gptq.g64", "int4.pack.g128", "int4.pack.g-1"),
    *("w4a8_fp8.g128", "mxfp4.g32", "nvfp4.g16", "nvfp4.g16.static", "nvfp4.g16.a16"),
)
PROFILES = (
    *("base", "serving", "graph", "mla", "moe", "lora", "ssm"),
    *("window", "soft_cap", "sinks", "cross", "buckets", "mesh"),
    *(f"quant:{fmt}" for fmt in TESTED),
)
HOST = "tpu/cpu"
# A copy of a page is one DMA: 16 KiB of a pool with one KV head a rank. A row of the page table is a fourth of what it is at 16.
TPU_PAGE = 64


class TpuBackend(Backend):
    """A device for each that JAX will list, and last `tpu:cpu`: the host through XLA's CPU compiler, every step as on a TPU, for tests."""

    name = "tpu"

    def probe(self) -> list[DeviceInfo]:
        found = [self._tpu(i, chip) for i, chip in enumerate(chips.on_this_host())]
        versions = _versions("jax", "torchax")
        if versions is None:
            return found
        host = DeviceInfo(
            backend=self.name,
            index=len(found),
            path=HOST,
            name="the host, compiled by XLA",
            score=-1,
            total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            facts={"emulated": True, "emulated_copies": 4},  # an interpreted kernel holds a pool so many times over
            versions=versions,
        )
        return [*found, host]

    def _tpu(self, index: int, chip: chips.Chip) -> DeviceInfo:
        return DeviceInfo(
            backend=self.name,
            index=index,
            path=f"tpu/{chip.name}",
            name=chip.kind,
            score=chip.score,
            total_memory=chip.hbm_bytes,
            facts={"hbm_bandwidth": chip.hbm_bandwidth},
            versions=_versions("libtpu", "jax", "torchax") or {},
            problem=problem(os.environ),
        )

    def absent_reason(self) -> str:
        return "no TPU is on the PCI bus, and jax or torchax is not installed: pip install 'sglang-tpu[tpu]' brings both, and libtpu"

    def shared_by_ranks(self, info: DeviceInfo) -> bool:
        return info.path == HOST

    def mesh(self, ctx: MeshContext) -> tuple[DeviceInfo, ...]:
        """The device asked for and those after it; of the host, as many devices as are wanted."""
        if ctx.device.path == HOST:
            return (ctx.device,) * ctx.num_ranks
        tpus = [info for info in self.probe() if info.path != HOST]
        mesh = tuple(tpus[ctx.device.index : ctx.device.index + ctx.num_ranks])
        if len(mesh) < ctx.num_ranks:
            raise DeviceError(
                f"tp_size={ctx.num_ranks} from {ctx.device.label} on: {len(tpus)} TPUs are here; set --tp-size to {len(mesh)} or less, or"
                " name an earlier device"
            )
        return mesh

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        from sglang_tpu.opened import open_devices  # jax: not needed to list devices
        from sglang_tpu.runtime import TpuRuntime

        return TpuRuntime(ctx, open_devices(ctx.devices))

    def claims(self, ctx: KernelContext) -> Claims:
        if ctx.device.path == HOST:
            return claims((*PROFILES, "odd_sizes"), attention=DTYPES)
        return claims(PROFILES, attention=("bfloat16",))

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        return [*KERNELS, *jax_kernels.KERNELS]

    def config_defaults(self, ctx: DefaultsContext) -> dict[str, Any]:
        return {"page_size": 16 if ctx.device.path == HOST else TPU_PAGE}


def problem(environ: Mapping[str, str]) -> str:
    """Why the TPUs here cannot be opened, where that can be seen from outside; "" where it cannot."""
    if _versions("libtpu", "jax", "torchax") is None:
        return "libtpu, jax or torchax is not installed: pip install 'sglang-tpu[tpu]'"
    if not chips.openable():
        return "no node of it in /dev may be opened: run as root or in the group that owns /dev/vfio, and give a container its devices (docker run --privileged)"
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return f"JAX_PLATFORMS={platforms} hides it: unset it, or set tpu,cpu"
    return ""


def _versions(*packages: str) -> dict[str, str] | None:
    """None where one is not installed."""
    try:
        return {name: version(name) for name in packages}
    except PackageNotFoundError:
        return None
