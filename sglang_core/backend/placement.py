"""Which devices a process of a server opens: those of its ranks, in its replica. Opens nothing."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_core.backend.devices import ChosenDevice, open_device
from sglang_core.backend.interface import DeviceInfo, MeshContext
from sglang_core.errors import DeviceError, PluginError


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The devices of one process, a rank each, and which of the `num_shares` processes on them it is: a host is several ranks'."""

    devices: tuple[DeviceInfo, ...]
    share: int = 0
    num_shares: int = 1


def place(device: ChosenDevice, *, tp_size: int, dp_size: int = 1, replica: int = 0, rank: int = 0) -> Placement:
    """Of process `rank` of a replica: a device for each of all ranks, from the one asked for on, or that one for all where they share it.

    Raises DeviceError where there are too few, PluginError where a mesh has another number than it was asked for.
    """
    if device.backend.shared_by_ranks(device.info):
        mesh = _mesh(device, device.info, tp_size)
        here = 1 if mesh else tp_size
        return Placement(devices=mesh or (device.info,), share=replica * here + rank, num_shares=dp_size * here)
    of_replica = _alike(device, tp_size, dp_size)[replica * tp_size :][:tp_size]
    return Placement(devices=_mesh(device, of_replica[0], tp_size) or (of_replica[rank],))


def num_processes(device: str, *, tp_size: int, dp_size: int = 1) -> int:
    """How many processes a replica is on what `--device` means. Raises as `open_device` and `place`."""
    if tp_size * dp_size == 1:
        return 1  # whether the device is there is the process's own to say
    return tp_size // len(place(open_device(device), tp_size=tp_size, dp_size=dp_size).devices)


def _mesh(device: ChosenDevice, first: DeviceInfo, num_ranks: int) -> tuple[DeviceInfo, ...]:
    """The devices that one process drives, where the backend has it so; else none."""
    if num_ranks == 1:
        return ()
    mesh = tuple(device.backend.mesh(MeshContext(device=first, num_ranks=num_ranks)))
    if len(mesh) not in (0, num_ranks):
        raise PluginError(
            f"backend {device.backend.name!r} gives {len(mesh)} devices for {num_ranks} ranks; its mesh() must give one a rank, or none"
        )
    return mesh


def _alike(device: ChosenDevice, tp_size: int, dp_size: int) -> list[DeviceInfo]:
    """The device asked for and those of its kind after it, as many as there are ranks."""
    wanted, first = tp_size * dp_size, device.info
    if wanted == 1:
        return [first]
    kind = [info for info in device.backend.probe() if info.path == first.path and not info.problem]
    found = sorted((info for info in kind if info.index >= first.index), key=lambda info: info.index)[:wanted]
    if len(found) < wanted:
        sizes = f"tp_size={tp_size}" + f" times dp_size={dp_size}" * (dp_size > 1)
        raise DeviceError(
            f"{sizes} takes {wanted} devices like {first.label} ({first.path}) and there are {len(found)} from it on "
            f"({', '.join(info.label for info in found)}); lower --tp-size{' or --dp-size' * (dp_size > 1)}, or name an earlier --device"
        )
    return found
