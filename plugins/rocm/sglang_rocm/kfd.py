"""The GPUs that Linux's compute driver for AMD lists under /sys: their topology is text, and reading it opens nothing.

Format: Documentation of the kernel's amdkfd, /sys/class/kfd/kfd/topology/nodes/N/{properties,mem_banks/M/properties}: lines of a name and a number.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NODES = "class/kfd/kfd/topology/nodes"
VRAM = (1, 2)  # heap types: visible to the host, and not


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    uuid: str  # "GPU-" and 16 hexadecimal digits, as ROCR_VISIBLE_DEVICES takes it
    target: str  # "gfx942"
    name: str
    total_memory: int  # bytes
    num_links: int  # to other GPUs


def read(sys: Path = Path("/sys")) -> tuple[Gpu, ...]:
    """In the order of the driver's nodes, which is that of HIP. Nodes that are CPUs are left out."""
    nodes = sys / NODES
    if not nodes.is_dir():
        return ()
    numbered = sorted((node for node in nodes.iterdir() if node.name.isdigit()), key=lambda node: int(node.name))
    return tuple(gpu for node in numbered if (gpu := _gpu(node, sys)) is not None)


def driver_version(sys: Path = Path("/sys")) -> str:
    """Of the amdgpu module; that of the kernel where it came with it."""
    path = sys / "module/amdgpu/version"
    return path.read_text().strip() if path.exists() else f"Linux {os.uname().release}"


def _gpu(node: Path, sys: Path) -> Gpu | None:
    facts = _properties(node / "properties")
    version = facts.get("gfx_target_version", 0)
    if not version or not facts.get("simd_count"):
        return None
    banks = [_properties(bank) for bank in sorted(node.glob("mem_banks/*/properties"))]
    links = [_properties(link) for link in sorted(node.glob("io_links/*/properties"))]
    device = sys / f"class/drm/renderD{facts.get('drm_render_minor', 0)}/device"
    named = device / "product_name"
    target = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    return Gpu(
        uuid=f"GPU-{facts.get('unique_id', 0):016x}",
        target=target,
        name=(named.read_text().strip() if named.exists() else "") or f"AMD {target}",
        total_memory=sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in VRAM),
        num_links=sum(link.get("type") == 11 for link in links),  # XGMI
    )


def _properties(path: Path) -> dict[str, int]:
    """{} where the file may not be read: the driver hides GPUs that this container was not given."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def visible(gpus: Sequence[Gpu], environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """Those that ROCR_VISIBLE_DEVICES leaves, and of these HIP_VISIBLE_DEVICES (or CUDA_VISIBLE_DEVICES, which HIP reads too)."""
    hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environ else "CUDA_VISIBLE_DEVICES"
    left = tuple(gpus)
    for variable in ("ROCR_VISIBLE_DEVICES", hip):
        if (text := environ.get(variable)) is not None:
            left = _listed(left, text)
    return left


def _listed(gpus: tuple[Gpu, ...], text: str) -> tuple[Gpu, ...]:
    """Up to the first entry that is no GPU, or is there twice."""
    chosen: list[Gpu] = []
    for entry in map(str.strip, text.split(",")):
        found = gpus[int(entry) : int(entry) + 1] if entry.isdigit() else [gpu for gpu in gpus if gpu.uuid == entry]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return tuple(chosen)
