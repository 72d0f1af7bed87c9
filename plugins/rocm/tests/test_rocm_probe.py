"""Which GPUs are listed, from a folder laid out as the kernel's /sys."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sglang_rocm import kfd
from sglang_rocm.backend import RocmBackend
from sglang_triton.gpu import backend, optional

MI300X, MI355X, MI250X = 90402, 90500, 90010
VRAM = 192 * 2**30


def lay_out(sys: Path, *versions: int, name: str = "AMD Instinct MI300X") -> None:
    """Node 0 is the host's CPU, as on every machine; a GPU for each of `versions`, linked with each other."""
    nodes = sys / kfd.NODES
    (nodes / "0").mkdir(parents=True)
    (nodes / "0/properties").write_text("cpu_cores_count 96\nsimd_count 0\ngfx_target_version 0\n")
    for i, version in enumerate(versions, start=1):
        node, device = nodes / str(i), sys / f"class/drm/renderD{127 + i}/device"
        (node / "mem_banks/0").mkdir(parents=True)
        device.mkdir(parents=True)
        (node / "properties").write_text(
            f"cpu_cores_count 0\nsimd_count 1216\ngfx_target_version {version}\ndrm_render_minor {127 + i}\nunique_id {i}\n"
        )
        (node / "mem_banks/0/properties").write_text(f"heap_type 1\nsize_in_bytes {VRAM}\nflags 0\n")
        (device / "product_name").write_text(name + "\n")
        for j in range(len(versions) - 1):
            (node / f"io_links/{j}").mkdir(parents=True)
            (node / f"io_links/{j}/properties").write_text("type 11\n")
    (sys / "module/amdgpu").mkdir(parents=True)
    (sys / "module/amdgpu/version").write_text("6.14.14\n")


@pytest.fixture
def rocm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RocmBackend:
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(backend, "version", lambda _: "2.13.0+rocm7.1")
    found = RocmBackend()
    found.sys = tmp_path
    return found


def test_a_device_for_each_gpu(rocm: RocmBackend, tmp_path: Path) -> None:
    lay_out(tmp_path, MI300X, MI355X)
    first, second = rocm.probe()
    assert (first.label, first.path, first.name) == ("rocm:0", "rocm/gfx942", "AMD Instinct MI300X")
    assert first.total_memory == VRAM and first.facts == {"uuid": f"GPU-{1:016x}", "links": 1}
    assert first.versions == {"driver": "6.14.14"} and not first.problem
    assert second.path == "rocm/gfx950" and second.score > first.score > 100


def test_it_is_noted_whether_aiter_is_used(rocm: RocmBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, MI300X)
    (note,) = rocm.probe()[0].notes
    assert note.name == "aiter" and "not used: amd-aiter is not installed" in note.found and not note.fix
    monkeypatch.setattr(optional, "version", lambda _: "0.1.22")
    assert rocm.probe()[0].notes[0].found == "used: `explain` says where"


def test_targets_are_hexadecimal(rocm: RocmBackend, tmp_path: Path) -> None:
    lay_out(tmp_path, MI250X)
    (info,) = rocm.probe()
    assert info.path == "rocm/gfx90a" and "kernels are for gfx942 and gfx950, and this is gfx90a" in info.problem


def test_nothing_and_why(rocm: RocmBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rocm.probe() == [] and "lists no GPU" in rocm.absent_reason()
    lay_out(tmp_path, MI300X)
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert rocm.probe() == [] and "none of the 1 GPUs" in rocm.absent_reason()


def test_a_gpu_that_a_container_was_not_given_is_left_out(rocm: RocmBackend, tmp_path: Path) -> None:
    lay_out(tmp_path, MI300X, MI300X)
    hidden = tmp_path / kfd.NODES / "1/properties"
    hidden.unlink()
    hidden.mkdir()  # reading it is an OSError, as where permission is denied
    (info,) = rocm.probe()
    assert info.facts["uuid"] == f"GPU-{2:016x}" and info.index == 0


@pytest.mark.parametrize(
    "environ, left",
    [
        ({}, "012"),
        ({"ROCR_VISIBLE_DEVICES": "2,0"}, "20"),
        ({"ROCR_VISIBLE_DEVICES": "2,0", "HIP_VISIBLE_DEVICES": "1"}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "1"}, "1"),
        ({"HIP_VISIBLE_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "1"}, "2"),
        ({"ROCR_VISIBLE_DEVICES": f"GPU-{2:016x}"}, "1"),
        ({"HIP_VISIBLE_DEVICES": "0,5,1"}, "0"),
        ({"HIP_VISIBLE_DEVICES": "1,1"}, "1"),
    ],
)
def test_visible_devices(tmp_path: Path, environ: dict[str, str], left: str) -> None:
    lay_out(tmp_path, MI300X, MI300X, MI300X)
    gpus = kfd.read(tmp_path)
    assert kfd.visible(gpus, environ) == tuple(gpus[int(i)] for i in left)


@pytest.mark.parametrize("build", ["2.13.0+cpu", "2.13.0+cu130", "2.13.0"])
def test_another_build_of_torch_says_what_to_install(
    rocm: RocmBackend, tmp_path: Path, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, MI300X)
    monkeypatch.setattr(backend, "version", lambda _: build)
    (info,) = rocm.probe()
    assert build in info.problem and "ROCm index" in info.problem


def test_listing_devices_imports_no_torch() -> None:
    code = "import sys; from sglang_rocm.backend import RocmBackend as B; b = B(); b.probe(); b.absent_reason(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_here_the_probe_is_clean() -> None:
    infos = RocmBackend().probe()
    assert all(info.path.startswith("rocm/gfx") for info in infos)
    assert infos or RocmBackend().absent_reason()
