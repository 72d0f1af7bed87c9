"""What a kernel gives to `sglang-core tune`: which of its choices depend on the device, and what they may be.

The core makes the calls that a model makes, times them and compares results; a `Tuner` knows what there is to choose from, and where
its choices are kept. Importing this imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from sglang_core.backend.interface import DeviceInfo

Config = Mapping[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneContext:
    """What a `Tuner` is made with. `out`: the file to write in place of the provider's own."""

    device: DeviceInfo
    op: str
    out: Path | None = None


@dataclass(frozen=True, slots=True)
class Knob:
    """One choice that kernels make by sizes known on the host. Equal knobs are the same choice, whichever call made it."""

    name: str  # "moe.fused"
    sizes: tuple[tuple[str, int | str], ...]

    @property
    def title(self) -> str:
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.sizes)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a knob stands at, and what else it may be set to; `unfit` candidates were left out, as they exceed the device's limits."""

    knob: Knob
    in_force: Config
    candidates: tuple[Config, ...]
    unfit: int = 0


class Tuner(ABC):
    """Made by a kernel's `tune`, "module:Class", with a `TuneContext`."""

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the configs in force come from, for people: files."""

    @abstractmethod
    def choices(self, call: Callable[[], object]) -> Sequence[Choice]:
        """Run `call` once, and say what its kernels chose on the way that could be chosen otherwise."""

    @abstractmethod
    def using(self, knob: Knob, config: Config) -> AbstractContextManager[None]:
        """Inside, the knob is set to `config`; other knobs are as they are in force. A config that does not run raises there."""

    @abstractmethod
    def write(self, best: Mapping[Knob, Config], about: Mapping[str, str]) -> Path:
        """Keep these from now on, beside what was kept for other knobs; `about` says when and on what they were found."""
