"""Which GPUs are listed, against a management library that says what one would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from sglang_cuda import notes, nvml
from sglang_cuda.backend import CudaBackend
from sglang_cuda.nvml import Gpu, visible
from sglang_triton.gpu import backend, optional

from sglang_core.api import DefaultsContext

H200 = {"uuid": "GPU-aa11", "name": "NVIDIA H200", "cc": (9, 0), "memory": 139 * 2**30, "links": 18}
A100 = {"uuid": "GPU-aa22", "name": "NVIDIA A100", "cc": (8, 0), "memory": 40 * 2**30, "links": 12}
T4 = {"uuid": "GPU-bb33", "name": "Tesla T4", "cc": (7, 5), "memory": 15 * 2**30, "links": 0}


class FakeNvml:
    """nvidia-ml-py's functions, on a list of GPUs. None: there is no driver."""

    def __init__(self, gpus: list[dict[str, Any]] | None) -> None:
        self.gpus, self.open = gpus, 0

    def nvmlInit(self) -> None:
        if self.gpus is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13000

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus or [])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        assert self.gpus is not None
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> str:
        return handle["uuid"]

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> str:
        return handle["name"]

    def nvmlDeviceGetCudaComputeCapability(self, handle: dict[str, Any]) -> tuple[int, int]:
        return handle["cc"]

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any]) -> Any:
        if handle.get("lost"):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return SimpleNamespace(total=handle["memory"])

    def nvmlDeviceGetNvLinkState(self, handle: dict[str, Any], link: int) -> int:
        if link >= handle["links"]:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    made: list[FakeNvml] = []

    def install(*gpus: dict[str, Any], driver: bool = True) -> CudaBackend:
        made.append(FakeNvml(list(gpus) if driver else None))
        for name in dir(FakeNvml):
            if name.startswith("nvml"):
                monkeypatch.setattr(pynvml, name, getattr(made[-1], name))
        return CudaBackend()

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(backend, "version", lambda _: "2.13.0+cu130")
    yield install
    assert all(fake.open == 0 for fake in made)  # what was opened was closed


def test_a_device_for_each_gpu(machine: Any) -> None:
    first, second = machine(H200, A100).probe()
    assert (first.label, first.path, first.name, first.total_memory) == (
        "cuda:0",
        "cuda/sm_90",
        "NVIDIA H200",
        139 * 2**30,
    )
    assert first.facts == {"uuid": "GPU-aa11", "nvlinks": 18} and first.versions == {
        "driver": "580.65.06",
        "cuda": "13.0",
    }
    assert (second.label, second.path, second.facts["nvlinks"]) == ("cuda:1", "cuda/sm_80", 12)
    assert first.score > second.score > 100 and not first.problem


def test_nothing_without_a_driver_and_why(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = machine(driver=False)
    assert absent.probe() == [] and "no NVIDIA driver answers" in absent.absent_reason()
    empty = machine()
    assert empty.probe() == [] and "finds no GPU" in empty.absent_reason()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = machine(H200, A100)
    assert hidden.probe() == [] and "none of the 2 GPUs" in hidden.absent_reason()


def test_a_lost_gpu_is_no_crash(machine: Any) -> None:
    assert machine(H200, A100 | {"lost": True}).probe() == []


def test_an_old_gpu_says_so(machine: Any) -> None:
    (info,) = machine(T4).probe()
    assert "compute capability 8.0 and later, and this has 7.5" in info.problem


@pytest.mark.parametrize("build", ["2.13.0+cpu", "2.13.0+rocm7.1"])
def test_another_build_of_torch_says_what_to_install(machine: Any, build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "version", lambda _: build)
    (info,) = machine(H200).probe()
    assert build in info.problem and "pip install" in info.problem


@pytest.mark.parametrize(
    "text, left",
    [("1", "1"), ("1,0", "10"), ("GPU-aa2", "1"), ("GPU-aa", ""), ("0,7,1", "0"), ("0,0", "0"), ("", ""), ("-1", "")],
)
def test_visible_devices(text: str, left: str) -> None:
    gpus = [
        Gpu(uuid=g["uuid"], name=g["name"], compute_capability=g["cc"], total_memory=1, num_nvlinks=0)
        for g in (H200, A100, T4)
    ]
    assert visible(gpus, {"CUDA_VISIBLE_DEVICES": text}) == tuple(gpus[int(i)] for i in left)
    assert visible(gpus, {}) == tuple(gpus)


def test_a_small_gpu_takes_shorter_chunks(machine: Any) -> None:
    cuda = machine(H200, A100)
    defaults = [cuda.config_defaults(DefaultsContext(device=info, model={})) for info in cuda.probe()]
    assert [made["chunked_prefill_size"] for made in defaults] == [8192, 2048]
    assert {made["prefill_graph_tokens"] for made in defaults} == {256}


def test_listing_devices_imports_no_torch() -> None:
    code = "import sys; from sglang_cuda.backend import CudaBackend as B; b = B(); b.probe(); b.absent_reason(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_here_the_probe_is_clean() -> None:
    """On a machine without a GPU: nothing found, and a reason. On one with: paths that kernels are written for."""
    infos = CudaBackend().probe()
    assert all(info.path.startswith("cuda/sm_") for info in infos)
    assert infos or CudaBackend().absent_reason()
    assert nvml.read() is not None or not infos


PACKAGES = {
    "flashinfer": "flashinfer-python",
    "sgl_kernel": "sgl-kernel",
    "flash_attn": "flash-attn",
    "deep_gemm": "deep-gemm",
}


def noted(backend: CudaBackend) -> dict[str, tuple[str, str]]:
    return {note.name: (note.found, note.fix) for note in backend.probe()[0].notes}


def test_what_gpus_can_do_without_is_noted(machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An all-reduce is worth building for several GPUs; packages that are not here are nobody's fault."""
    monkeypatch.setattr(notes, "LIBRARY", tmp_path / "lib.so")
    one, two = noted(machine(H200)), noted(machine(H200, H200))
    assert "single GPU" in one["all-reduce"][0] and one["all-reduce"][1] == ""
    assert two["all-reduce"][1].startswith("python -m sglang_cuda.build_all_reduce")
    for name, package in PACKAGES.items():
        how = "get" if name == "deep_gemm" else "pip install"  # what PyPI has of it does not build
        assert f"{package} is not installed; {how} " in one[name][0] and one[name][1] == ""
    (tmp_path / "lib.so").touch()
    monkeypatch.setattr(optional, "version", lambda name: "0.7.2" if name == "flashinfer-python" else "2.5")
    found = noted(machine(H200, H200))
    assert found["all-reduce"][0].startswith("built") and found["all-reduce"][1] == ""
    assert found["flashinfer"][0].startswith("used")
    assert all("2.5 is installed" in found[name][0] for name in PACKAGES if name != "flashinfer")
