"""Which kernels of sglang-triton NPUs are offered, and why they are refused. triton-ascend is not needed: what is installed is told."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType

import pytest
from sglang_npu import triton_ascend
from sglang_npu.backend import NpuBackend

from sglang_core.api import DeviceInfo, OpSite
from sglang_core.api.ops import OPS, GatedDeltaSpec
from sglang_core.backend.selection import BoundOp, OpTable

ASCEND = {"triton-ascend": "3.2.0"}


def bound(
    installed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    op: str = "ssm.gated_delta_rule",
    dim: int = 128,
    **facts: object,
) -> BoundOp:
    """On a machine with these packages."""

    def version(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(triton_ascend, "version", version)
    info = DeviceInfo(backend="npu", path="npu/910b3", name="Ascend 910B3", facts=facts)
    table = OpTable(info, NpuBackend(), ops=OPS, page_size=128)
    spec = GatedDeltaSpec(num_k_heads=16, num_v_heads=32, k_head_dim=dim, v_head_dim=128, conv_width=4, scale=0.1)
    return table.bind(OpSite(op=op, layer="GatedDeltaNet", dtype="bfloat16", spec=spec))


@pytest.mark.parametrize("op", triton_ascend.FUNCTIONS)
def test_recurrent_ops_are_tritons_where_it_is_installed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = triton_ascend.FUNCTIONS[op].partition(":")
    fake = ModuleType(module)
    setattr(fake, name, lambda: op)
    monkeypatch.setitem(sys.modules, module, fake)
    found = bound(ASCEND, monkeypatch, op=op)
    assert found.fn() == op
    assert found.provider == "triton" and found.kernels[0].fn == triton_ascend.FUNCTIONS[op]


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        ({}, "triton-ascend is not installed; pip install 'sglang-npu[triton]'"),
        ({"triton-ascend": "3.4.0"}, "written for triton-ascend >=3.2,<3.3, and 3.4.0 is installed"),
        (ASCEND | {"triton": "3.6.0"}, "triton 3.6.0 is installed beside triton-ascend"),
    ],
)
def test_what_is_missing_is_said_and_the_definition_runs(
    installed: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bound(installed, monkeypatch)
    assert found.provider == "reference"
    assert [reason in why for kernel, why in found.refused if kernel.startswith("triton")] == [True]


def test_without_the_kernels_it_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ascend, "find_spec", lambda name: None)
    assert any("sglang-triton is not installed" in why for _, why in bound(ASCEND, monkeypatch).refused)


def test_wide_keys_and_emulated_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any("at most 128 dims, not 192" in why for _, why in bound(ASCEND, monkeypatch, dim=192).refused)
    assert any("this one is emulated" in why for _, why in bound(ASCEND, monkeypatch, emulated=True).refused)
