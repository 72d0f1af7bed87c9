"""Every launch of a GPU's kernels but the last step: compiled for an H200 by Triton's JIT, arguments packed by its launcher, onto a driver that
runs nothing (libcuda.c). What an op returns means nothing here; that it returns does. `run.sh` beside this sets up what it needs.
"""

from __future__ import annotations

import ctypes
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import sglang_triton.attention_plan
import sglang_triton.gpu.linear
import torch
from sglang_conformance.runner import Suite
from sglang_cuda.backend import CudaBackend
from sglang_triton.gpu.runtime import GpuRuntime
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver

from benchmarks.gpu import kernels, loads_products
from benchmarks.gpu.conformance import promoted, select
from benchmarks.gpu.opened import ASKED_FOR, Opened
from sglang_core.api import DeviceInfo, RuntimeContext
from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.interface import KernelContext
from sglang_core.backend.providers import Providers, collect_kernels
from tests.backend.fake_driver import FakeDriver

H200 = DeviceInfo(backend="cuda", path="cuda/sm_90", name="NVIDIA H200", score=209, total_memory=139 << 30)
PROCESSORS, FEW_EXPERTS = 132, 16  # a host has no room for all of DeepSeek-V3's
LARGE = ("one of 100k",)  # nor for this pool, of 26 GB
RAISED = re.compile(r"\w+(Error|Exception|OutOfResources): ")


class TritonDriver:
    """What Triton asks of the active driver."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Runtime(GpuRuntime):
    def time_calls(self, call: Callable[[], object], *, repeats: int, replayed: bool = False) -> list[float]:
        call()
        return [1e-3] * repeats


class Rehearsed(Opened):
    """An H200 whose tensors are the host's."""

    on_gpu = False  # type: ignore[assignment]  # torch's own kernels beside ours are not there

    def __init__(self) -> None:
        self.small = False
        self.chosen = ChosenDevice(backend=CudaBackend(), info=H200, reason="")
        self.__dict__["runtime"] = runtime(RuntimeContext(devices=(H200,)))


def runtime(ctx: RuntimeContext) -> Runtime:
    return Runtime(ctx, FakeDriver())  # type: ignore[arg-type]


def scaled_mm(a: Tensor, b: Tensor, *facts: Any, bias: Tensor | None = None, output_dtype: torch.dtype) -> Tensor:
    """cuBLASLt's, which a host lacks."""
    return torch.zeros(a.shape[0], b.shape[1], dtype=output_dtype)


@contextmanager
def rehearsing() -> Iterator[None]:
    driver.set_active(TritonDriver())
    loads_products.EXPERTS["DeepSeek-V3"]["X"] = FEW_EXPERTS
    with (
        mock.patch.object(sglang_triton.attention_plan, "num_processors", return_value=PROCESSORS),
        mock.patch.object(sglang_triton.gpu.linear, "scaled_mm", scaled_mm),
        mock.patch.object(CudaBackend, "create_runtime", side_effect=runtime),
    ):
        yield


def loads(text: str) -> Iterator[str]:
    """Of part `kernels`, at their own sizes: the title of each that raises."""
    library = ctypes.CDLL("libcuda.so.1")
    counters = library.num_launches, library.num_dependent
    for load in kernels.all_loads():
        if text not in load.name or any(name in load.name for name in LARGE):
            continue
        try:
            with torch.inference_mode():
                work = load.make(Rehearsed())
                for name, call in {work.provider: work.call, **work.compared}.items():
                    before = [count() for count in counters]
                    call()
                    all_of_them, dependent = (count() - old for count, old in zip(counters, before, strict=True))
                    print(f"{load.name}: {name}, {all_of_them} launches, {dependent} of them dependent", flush=True)
        except Exception:
            traceback.print_exc()
            yield load.name


def cases(text: str) -> Iterator[str]:
    """Of the suite, as part `conformance` judges them: the title and reason of each in which something raised."""
    backend, device = CudaBackend(), KernelContext(device=H200)
    suite = Suite(backend, H200, full=False)
    work = [
        (case, dtype) for case, dtype in select(suite, text, small=False) if not case.op.startswith(("e2e.", "comm."))
    ]
    found = [(suite, work)]
    for provider in ASKED_FOR:
        first, ops = promoted(collect_kernels(backend, device, Providers()), provider)
        found.append((Suite(backend, H200, kernels=first, full=False), [pair for pair in work if pair[0].op in ops]))
    for suite, chosen in found:
        for case, dtype in chosen:
            result = suite.judge(case, dtype)
            if RAISED.match(result.reason) and not result.reason.startswith("AssertionError"):
                yield f"{result.title}: {result.reason}"
        print(f"{len(chosen)} cases", flush=True)


def main() -> int:
    """Arguments: `loads` or `cases`, and what is in the name of those that are wanted."""
    what, text = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    with rehearsing():
        raised = 0
        for reason in loads(text) if what == "loads" else cases(text):
            print(f"RAISED {reason}", flush=True)
            raised += 1
    return int(raised > 0)


if __name__ == "__main__":
    sys.exit(main())
