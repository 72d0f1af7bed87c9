"""What Ascend's management library (DCMI, part of the driver) says of the NPUs here. It opens no device, so that listing costs milliseconds."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVER = Path("/usr/local/Ascend/driver")
MAX_CARDS = 64


class _ChipInfo(ctypes.Structure):
    _fields_ = [
        ("chip_type", ctypes.c_char * 32),
        ("chip_name", ctypes.c_char * 32),
        ("chip_ver", ctypes.c_char * 32),
        ("aicore_cnt", ctypes.c_uint),
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    chips: tuple[str, ...]  # the name of each, "910B3", in the order of their ids
    driver: str  # "25.0.rc1", or "unknown"


def read(driver: Path = DRIVER, library: Any = None) -> Machine | None:
    """None where no driver answers. `library`: what speaks DCMI, in place of the driver's."""
    if library is None:
        try:
            library = ctypes.CDLL(str(driver / "lib64" / "driver" / "libdcmi.so"))
        except OSError:
            return None
    if library.dcmi_init() != 0:
        return None
    count, cards = ctypes.c_int(), (ctypes.c_int * MAX_CARDS)()
    if library.dcmi_get_card_num_list(ctypes.byref(count), cards, MAX_CARDS) != 0:
        return None
    chips = [name for card in cards[: count.value] for name in _chips_of(library, card)]
    return Machine(chips=tuple(chips), driver=_version(driver / "version.info"))


def _chips_of(library: Any, card: int) -> list[str]:
    """A card has one chip or two; other devices on it, as its controller, have names of their own or none."""
    count = ctypes.c_int()
    if library.dcmi_get_device_num_in_card(card, ctypes.byref(count)) != 0:
        return []
    names = []
    for device in range(count.value):
        info = _ChipInfo()
        if library.dcmi_get_device_chip_info(card, device, ctypes.byref(info)) == 0 and info.aicore_cnt:
            names.append(info.chip_name.decode())
    return names


def _version(path: Path) -> str:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition("=")[2] for line in lines if line.startswith("Version=")), "unknown")


def visible(chips: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Those that ASCEND_RT_VISIBLE_DEVICES leaves: ascending ids, up to the first that is none or does not ascend."""
    if (text := environ.get("ASCEND_RT_VISIBLE_DEVICES")) is None:
        return tuple(chips)
    chosen: list[int] = []
    for entry in map(str.strip, text.split(",")):
        if not entry.isdigit() or int(entry) >= len(chips) or (chosen and int(entry) <= chosen[-1]):
            break
        chosen.append(int(entry))
    return tuple(chips[i] for i in chosen)
