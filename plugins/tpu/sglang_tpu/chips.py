"""Which TPUs are here, and what is known of each kind without opening one. Imports nothing heavy.

libtpu is not asked: where it finds no TPU it looks for one over the network, and where it finds one it takes it for this process.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_core.api import DeviceInfo

GOOGLE = "0x1ae0"  # PCI vendor
PCI = Path("/sys/bus/pci/devices")
DEV = Path("/dev")
# libtpu's: which chips of the host are this process's, how they lie, and how many processes work as one.
VISIBLE, BOUNDS, PROCESSES = "TPU_VISIBLE_CHIPS", "TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_PROCESS_BOUNDS"
SLICES = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1"}  # numbers of chips that are a slice of a host


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """One device as JAX lists it: a chip, or of 7x half of one.

    Memory and bandwidth are the vendor's (cloud.google.com/tpu/docs); a device's own runtime says how much of it a program may have.
    """

    name: str  # as in a device path: "tpu/v6e"
    kind: str  # jax.Device.device_kind
    score: int
    pci_id: str
    per_chip: int = 1  # devices of one PCI device
    hbm_bytes: int
    hbm_bandwidth: float  # bytes a second
    topologies: tuple[tuple[int, str], ...]  # of so many devices, as libtpu's compiler names it; from the smallest

    def topology(self, num_devices: int) -> str:
        """The smallest that has so many devices. Raises LookupError where none has."""
        for size, name in self.topologies:
            if size >= num_devices:
                return name
        raise LookupError(
            f"{num_devices} devices of {self.name}: steps are compiled for up to {self.topologies[-1][0]}"
        )


CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v5e",
            kind="TPU v5 lite",
            score=205,
            pci_id="0x0063",
            hbm_bytes=16 << 30,
            hbm_bandwidth=819e9,
            topologies=((4, "v5e:2x2"), (8, "v5e:2x4")),
        ),
        Chip(
            name="v6e",
            kind="TPU v6 lite",
            score=206,
            pci_id="0x006f",
            hbm_bytes=32 << 30,
            hbm_bandwidth=1640e9,
            topologies=((4, "v6e:2x2"), (8, "v6e:2x4")),
        ),
        Chip(
            name="7x",
            kind="TPU7x",
            score=207,
            pci_id="0x0076",
            per_chip=2,
            hbm_bytes=96 << 30,
            hbm_bandwidth=3690e9,
            topologies=((8, "tpu7x:2x2x1"), (16, "tpu7x:2x2x2")),
        ),
    )
}
BY_PCI_ID = {chip.pci_id: chip for chip in CHIPS.values()}


def on_this_host(pci: Path = PCI) -> list[Chip]:
    """Each device of the TPUs on the PCI bus, whether or not this process may open it. Takes milliseconds."""
    folders = sorted(pci.iterdir()) if pci.is_dir() else []
    chips = [BY_PCI_ID[found] for found in map(_pci_id, folders) if found in BY_PCI_ID]
    return [chip for chip in chips for _ in range(chip.per_chip)]


def _pci_id(folder: Path) -> str:
    """Of a device of Google's; "" of others'."""
    try:
        vendor, device = ((folder / name).read_text().strip() for name in ("vendor", "device"))
    except OSError:  # it was taken out meanwhile, or is not ours to read
        return ""
    return device if vendor == GOOGLE else ""


def openable(dev: Path = DEV) -> bool:
    """Whether this process may open a node of one of the two drivers that TPUs have had."""
    nodes = [*dev.glob("accel[0-9]*"), *(dev / "accel").glob("accel[0-9]*"), *(dev / "vfio").glob("[0-9]*")]
    return any(os.access(node, os.R_OK | os.W_OK) for node in nodes)


def see_only(infos: Sequence[DeviceInfo], num_here: int, environ: MutableMapping[str, str] = os.environ) -> int:
    """Has libtpu take the chips of these devices only, so that other processes (replicas) may have the others -> the first that JAX lists.

    All of the host's, of `num_here` devices, where the user says which, and where they are no slice of it.
    """
    if len(infos) == num_here or any(name in environ for name in (VISIBLE, BOUNDS, PROCESSES)):
        return 0
    per_chip = CHIPS[infos[0].path.rpartition("/")[2]].per_chip
    wanted = sorted({info.index // per_chip for info in infos})
    if len(wanted) not in SLICES or len(wanted) * per_chip == num_here:
        return 0
    environ |= {VISIBLE: ",".join(map(str, wanted)), BOUNDS: SLICES[len(wanted)], PROCESSES: "1,1,1"}
    return wanted[0] * per_chip
