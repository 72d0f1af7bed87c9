"""What is listed, with neither torch nor torch_npu being imported: these run on every machine."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
from sglang_npu import backend, dcmi
from sglang_npu.backend import NpuBackend

from sglang_core.api import DefaultsContext


class FakeDcmi:
    """A driver's library: cards, each with the names of its devices; a device that is no chip has none."""

    def __init__(self, *cards: tuple[str, ...], broken: str = "") -> None:
        self.cards, self.broken = cards, broken

    def dcmi_init(self) -> int:
        return int(self.broken == "init")

    def dcmi_get_card_num_list(self, count: object, cards: ctypes.Array[ctypes.c_int], length: int) -> int:
        count._obj.value = len(self.cards)  # type: ignore[attr-defined]  what byref points to
        for i in range(len(self.cards)):
            cards[i] = i
        return int(self.broken == "list")

    def dcmi_get_device_num_in_card(self, card: int, count: object) -> int:
        count._obj.value = len(self.cards[card])  # type: ignore[attr-defined]
        return 0

    def dcmi_get_device_chip_info(self, card: int, device: int, info: object) -> int:
        info._obj.chip_name = self.cards[card][device].encode()  # type: ignore[attr-defined]
        info._obj.aicore_cnt = 20 if self.cards[card][device] else 0  # type: ignore[attr-defined]
        return 0


def installed(monkeypatch: pytest.MonkeyPatch, *chips: str, version: str | None = "2.13.0") -> None:
    monkeypatch.setattr(dcmi, "read", lambda: dcmi.Machine(chips=chips, driver="25.0.rc1"))
    monkeypatch.setattr(backend, "_installed", lambda: version)
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)


def test_chips_are_read_card_by_card(tmp_path: Path) -> None:
    (tmp_path / "version.info").write_text("Version=25.0.rc1\nancient=1\n")
    machine = dcmi.read(tmp_path, FakeDcmi(("910B3", ""), ("910B3",)))
    assert machine == dcmi.Machine(chips=("910B3", "910B3"), driver="25.0.rc1")


@pytest.mark.parametrize("broken", ["init", "list"])
def test_a_driver_that_refuses_means_no_device(tmp_path: Path, broken: str) -> None:
    assert dcmi.read(tmp_path, FakeDcmi(("910B3",), broken=broken)) is None


def test_without_a_driver_there_is_no_device(tmp_path: Path) -> None:
    assert dcmi.read(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "left"),
    [(None, "abc"), ("", ""), ("1", "b"), ("0, 2", "ac"), ("2,0", "c"), ("0,3", "a"), ("x", ""), ("1,1", "b")],
)
def test_the_environment_leaves_devices_as_the_runtime_reads_it(text: str | None, left: str) -> None:
    environ = {} if text is None else {"ASCEND_RT_VISIBLE_DEVICES": text}
    assert "".join(dcmi.visible("abc", environ)) == left


def test_each_npu_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "910B3", "Ascend910_9392")
    first, second = NpuBackend().probe()
    assert (first.label, first.path, first.name, first.problem) == ("npu:0", "npu/910b3", "Ascend 910B3", "")
    assert (second.index, second.name, second.problem) == (1, "Ascend 910_9392", "")
    assert first.versions == {"driver": "25.0.rc1", "torch_npu": "2.13.0"} and first.score >= 100


def test_defaults_are_what_the_kernels_want(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "910B3")
    (info,) = NpuBackend().probe()
    defaults = NpuBackend().config_defaults(DefaultsContext(device=info, model={}))
    assert (defaults["page_size"], defaults["dtype"]) == (128, "bfloat16")


def test_a_chip_of_another_series_is_listed_and_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "310P3")
    (info,) = NpuBackend().probe()
    assert "310P3" in info.problem and "--device cpu" in info.problem


def test_without_torch_npu_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "910B3", version=None)
    (info,) = NpuBackend().probe()
    assert "pip install" in info.problem


def test_absence_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcmi, "read", lambda: None)
    assert NpuBackend().probe() == [] and "driver" in NpuBackend().absent_reason()
    installed(monkeypatch, "910B3")
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(dcmi, "visible", lambda chips: ())
    assert NpuBackend().probe() == [] and "ASCEND_RT_VISIBLE_DEVICES" in NpuBackend().absent_reason()
    installed(monkeypatch)
    assert "finds no NPU" in NpuBackend().absent_reason()


def test_listing_devices_imports_neither_torch_nor_torch_npu() -> None:
    code = (
        "import sys; from sglang_npu.backend import NpuBackend as B; b = B(); b.probe(); b.kernels(None); b.claims(None);"
        " b.absent_reason(); print([name for name in ('torch', 'torch_npu') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
