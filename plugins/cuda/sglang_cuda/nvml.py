"""What NVIDIA's management library says of the GPUs here. It opens no CUDA context, so that listing devices costs milliseconds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pynvml


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU, as the driver knows it."""

    uuid: str
    name: str
    compute_capability: tuple[int, int]
    total_memory: int  # bytes
    num_nvlinks: int  # that are up


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    gpus: tuple[Gpu, ...]  # by PCI bus
    driver: str  # "580.65.06"
    cuda: str  # the newest that the driver runs, "13.0"


def read() -> Machine | None:
    """None where no driver answers."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        cuda = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return Machine(
            gpus=tuple(_gpu(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())),
            driver=str(pynvml.nvmlSystemGetDriverVersion()),
            cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
        )
    except pynvml.NVMLError:  # a GPU that fell off the bus, a driver older than its library
        return None
    finally:
        pynvml.nvmlShutdown()


def _gpu(handle: object) -> Gpu:
    return Gpu(
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        name=str(pynvml.nvmlDeviceGetName(handle)),
        compute_capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        total_memory=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        num_nvlinks=sum(_nvlink_is_up(handle, link) for link in range(pynvml.NVML_NVLINK_MAX_LINKS)),
    )


def _nvlink_is_up(handle: object, link: int) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetNvLinkState(handle, link))
    except pynvml.NVMLError:  # there is no such link
        return False


def visible(gpus: Sequence[Gpu], environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order: as CUDA reads it, up to the first entry that is no GPU.

    Entries are indices or beginnings of UUIDs. CUDA's own order is the fastest first unless CUDA_DEVICE_ORDER=PCI_BUS_ID; between GPUs of one kind,
    which are all that one engine is meant to run on, there is no difference.
    """
    if (text := environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for entry in map(str.strip, text.split(",")):
        if entry.isdigit():
            found = list(gpus[int(entry) : int(entry) + 1])
        else:
            found = [gpu for gpu in gpus if entry and gpu.uuid.startswith(entry)]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return tuple(chosen)
