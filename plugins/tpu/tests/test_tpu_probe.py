"""What is listed, without jax being imported: these run on every machine."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from sglang_tpu import backend, chips
from sglang_tpu.backend import TpuBackend

from sglang_core.api import DeviceError, KernelContext, MeshContext, Support

VERSIONS = {"jax": "0.10.2", "torchax": "0.0.13", "libtpu": "0.0.42.1"}


@pytest.fixture(autouse=True)
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without TPUs, to which tests add."""
    for name in ("pci", "dev"):
        (tmp_path / name).mkdir()
    on_this_host, openable = chips.on_this_host, chips.openable
    monkeypatch.setattr(chips, "on_this_host", lambda: on_this_host(tmp_path / "pci"))
    monkeypatch.setattr(chips, "openable", lambda: openable(tmp_path / "dev"))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return tmp_path


def plug(bus: Path, slot: str, vendor: str, device: str) -> None:
    folder = bus / "pci" / f"0000:00:{slot}.0"
    folder.mkdir()
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{device}\n")


def nodes(bus: Path) -> None:
    (bus / "dev" / "vfio").mkdir()
    (bus / "dev" / "vfio" / "0").touch()


@pytest.fixture
def four_v6e(bus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(backend, "version", VERSIONS.__getitem__)
    plug(bus, "01", "0x8086", "0x006f")  # the same number, another vendor's
    plug(bus, "02", chips.GOOGLE, "0x0042")  # Google's, and no TPU
    for slot in ("04", "05", "06", "07"):
        plug(bus, slot, chips.GOOGLE, "0x006f")
    return bus


def test_tpus_are_found_on_the_pci_bus(four_v6e: Path) -> None:
    nodes(four_v6e)
    *tpus, host = TpuBackend().probe()
    assert [info.label for info in (*tpus, host)] == ["tpu:0", "tpu:1", "tpu:2", "tpu:3", "tpu:4"]
    assert {(info.path, info.name, info.total_memory, info.problem) for info in tpus} == {
        ("tpu/v6e", "TPU v6 lite", 32 << 30, "")
    }
    assert tpus[0].score > 100 and tpus[0].versions["libtpu"] == "0.0.42.1"
    assert host.path == "tpu/cpu"


def test_a_7x_is_two_devices(bus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "version", VERSIONS.__getitem__)
    plug(bus, "04", chips.GOOGLE, "0x0076")
    assert [info.path for info in TpuBackend().probe()] == ["tpu/7x", "tpu/7x", "tpu/cpu"]


def test_a_process_sees_the_chips_it_was_given_and_no_others(four_v6e: Path) -> None:
    tpus = TpuBackend().probe()[:4]
    for given, seen, bounds in (([1], "1", "1,1,1"), ([2, 3], "2,3", "1,2,1")):
        environ: dict[str, str] = {}
        assert chips.see_only([tpus[i] for i in given], 4, environ) == given[0]
        assert environ == {chips.VISIBLE: seen, chips.BOUNDS: bounds, chips.PROCESSES: "1,1,1"}
    for given, environ in ((tpus, {}), (tpus[:3], {}), (tpus[:1], {chips.VISIBLE: "3"})):
        before = dict(environ)
        assert chips.see_only(given, 4, environ) == 0 and environ == before, (
            "all of them, no slice, and as the user says"
        )


def test_half_a_7x_is_one_chip(bus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "version", VERSIONS.__getitem__)
    for slot in ("04", "05"):
        plug(bus, slot, chips.GOOGLE, "0x0076")
    environ: dict[str, str] = {}
    assert chips.see_only(TpuBackend().probe()[2:4], 4, environ) == 2 and environ[chips.VISIBLE] == "1"


def test_a_tpu_that_cannot_be_opened_says_why(four_v6e: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "/dev" in TpuBackend().probe()[0].problem
    nodes(four_v6e)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS=cpu" in TpuBackend().probe()[0].problem
    monkeypatch.setenv("JAX_PLATFORMS", "cpu,tpu")
    assert TpuBackend().probe()[0].problem == ""

    def without_libtpu(name: str) -> str:
        if name == "libtpu":
            raise PackageNotFoundError(name)
        return VERSIONS[name]

    monkeypatch.setattr(backend, "version", without_libtpu)
    assert "pip install 'sglang-tpu[tpu]'" in TpuBackend().probe()[0].problem


def test_the_host_is_a_device_that_is_never_taken_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "version", VERSIONS.__getitem__)
    (info,) = TpuBackend().probe()
    assert (info.label, info.path) == ("tpu:0", "tpu/cpu") and info.score < 0 and info.facts["emulated"]
    assert info.versions == {"jax": "0.10.2", "torchax": "0.0.13"}


def test_a_tpu_claims_less_than_the_host_that_interprets_its_kernels(four_v6e: Path) -> None:
    """Mosaic takes attention in bfloat16 only, and no odd sizes."""
    tpu, *_, host = TpuBackend().probe()
    on_tpu, on_host = (TpuBackend().claims(KernelContext(device=info)) for info in (tpu, host))
    for op, wide in {"attn.paged": False, "kv.write": False, "norm.rms": True}.items():
        assert on_tpu.support(op, fmt="*", dtype="bfloat16") is Support.NATIVE
        assert (on_tpu.support(op, fmt="*", dtype="float32") is Support.NATIVE) == wide
        assert on_host.support(op, fmt="*", dtype="float32") is Support.NATIVE
    assert set(on_host.profiles) - set(on_tpu.profiles) == {"odd_sizes"}


def test_without_jax_there_is_none_and_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(backend, "version", missing)
    assert TpuBackend().probe() == [] and "pip install" in TpuBackend().absent_reason()


def test_listing_devices_imports_neither_torch_nor_jax() -> None:
    code = (
        "import sys; from sglang_tpu.backend import TpuBackend as B; b = B(); b.probe(); b.kernels(None); b.absent_reason();"
        " print([name for name in ('torch', 'jax', 'torchax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_mesh_is_the_device_asked_for_and_those_after_it(four_v6e: Path) -> None:
    tpus = TpuBackend().probe()
    assert TpuBackend().mesh(MeshContext(device=tpus[1], num_ranks=2)) == tuple(tpus[1:3])
    with pytest.raises(DeviceError, match="tp_size=4 from tpu:1 on: 4 TPUs are here; set --tp-size to 3 or less"):
        TpuBackend().mesh(MeshContext(device=tpus[1], num_ranks=4))
    assert (
        TpuBackend().mesh(MeshContext(device=tpus[4], num_ranks=8)) == (tpus[4],) * 8
    )  # the host is as many as are wanted
