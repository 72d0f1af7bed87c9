"""The device that a part runs on, opened: kernels as a model gets them, and times as the runtime takes them."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch

from sglang_core.backend.devices import ChosenDevice, open_device
from sglang_core.backend.interface import DeviceRuntime, RuntimeContext
from sglang_core.backend.kernel import OpSite
from sglang_core.backend.selection import BoundOp, OpTable
from sglang_core.bench.op_calls import Operands
from sglang_core.errors import KernelSelectionError
from sglang_core.ops import OPS

SEED, REPEATS, PAGE_SIZE = 0, 21, 64
ASKED_FOR = ("hopper", "blackwell", "streamed")  # providers that nothing takes unless it is asked for


class Opened:
    """One device. `small`: sizes at which a host goes through every case in seconds; their figures mean nothing."""

    def __init__(self, device: str, *, small: bool) -> None:
        torch.manual_seed(SEED)
        self.small = small
        self.chosen: ChosenDevice = open_device(device)

    @property
    def facts(self) -> dict[str, str]:
        info = self.chosen.info
        return {"name": info.name, "path": info.path, **info.versions}

    @property
    def on_gpu(self) -> bool:
        return self.device.type != "cpu"

    @cached_property
    def runtime(self) -> DeviceRuntime:
        return self.chosen.backend.create_runtime(RuntimeContext(devices=(self.chosen.info,)))

    @property
    def device(self) -> torch.device:
        return self.runtime.torch_device

    def release(self) -> None:
        """Give memory that nothing uses back to the device: the next case may be in a process of its own."""
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def answers(self) -> bool:
        """Whether the device can still be used: after an illegal address it cannot, in this process."""
        try:
            self.runtime.synchronize()
        except RuntimeError:
            return False
        return True

    def table(self, page_size: int = PAGE_SIZE, **more: Any) -> OpTable:
        return OpTable(
            self.chosen.info,
            self.chosen.backend,
            ops=OPS,
            page_size=page_size,
            **more,
            fallback="allow",
            quant_fallback="reference",
        )

    def operands(self, *, context: int = 1) -> Operands:
        generator = torch.Generator().manual_seed(SEED)
        return Operands(runtime=self.runtime, table=self.table(), context=context, generator=generator)

    def bind(self, make: Operands, op: str, **facts: Any) -> BoundOp:
        return make.table.bind(OpSite(op=op, layer="Benchmark", dtype="bfloat16", **facts))

    def asked_for(self, op: str, **facts: Any) -> dict[str, BoundOp]:
        """As `bind`, of each provider that nothing takes unless it is asked for, and that has a kernel for this here."""
        made = {}
        for provider in ASKED_FOR:
            with suppress(KernelSelectionError):
                table = self.table(overrides={op: provider})
                made[provider] = table.bind(OpSite(op=op, layer="Benchmark", dtype="bfloat16", **facts))
        return made

    def seconds(self, call: Callable[[], object], *, replayed: bool = True) -> float:
        """The median of a call on the device, caches swept before each; as a graph where it may be one, so that launches do not count."""
        with torch.inference_mode():
            for _ in range(2):
                call()
            self.runtime.synchronize()
            return statistics.median(
                self.runtime.time_calls(call, repeats=3 if self.small else REPEATS, replayed=replayed)
            )
