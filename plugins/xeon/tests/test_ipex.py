"""Intel Extension for PyTorch is not installed here: a module with its public function stands for it."""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType

import pytest
import torch
from sglang_xeon import ipex
from sglang_xeon.backend import XeonBackend
from torch import Tensor

from sglang_core.api import DeviceInfo, KernelContext, OpSite
from sglang_core.api.ops import OPS
from sglang_core.backend.selection import OpTable

INFO = DeviceInfo(backend="xeon", path="xeon/avx2", name="test", facts={"isa": "avx2", "isa_of_cpu": "avx2"})
SITE = OpSite(op="norm.rms", layer="RMSNorm", dtype="bfloat16", dims={"M": 8})


def install(monkeypatch: pytest.MonkeyPatch, version: str, torch_version: str) -> list[Tensor]:
    """-> the inputs that its rms_norm has seen."""
    versions, installed = {ipex.PACKAGE: version, "torch": torch_version}, metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or installed(name))
    seen: list[Tensor] = []

    def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
        seen.append(hidden_states)
        return torch.nn.functional.rms_norm(hidden_states, weight.shape, weight, eps)

    package, llm = ModuleType("intel_extension_for_pytorch"), ModuleType("intel_extension_for_pytorch.llm")
    llm.functional = ModuleType("intel_extension_for_pytorch.llm.functional")  # type: ignore[attr-defined]
    llm.functional.rms_norm = rms_norm
    package.llm = llm  # type: ignore[attr-defined]
    for module in (package, llm, llm.functional):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "sglang_xeon.ipex_kernels", raising=False)
    return seen


def table(overrides: dict[str, str]) -> OpTable:
    return OpTable(INFO, XeonBackend(), ops=OPS, overrides=overrides, page_size=16)


def test_it_is_used_where_it_is_asked_for_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = install(monkeypatch, "2.13.1+cpu", "2.13.0")
    x, weight = torch.randn(3, 8).bfloat16(), torch.rand(8).bfloat16()
    ours = table({}).bind(SITE)
    assert ours.provider == "xeon"
    assert "sglang_xeon.ipex_kernels" not in sys.modules
    theirs = table({"norm.rms": "ipex"}).bind(SITE)
    assert theirs.provider == "ipex"
    torch.testing.assert_close(theirs.fn(x, weight, 1e-6), ours.fn(x, weight, 1e-6), rtol=1e-2, atol=1e-2)
    assert len(seen) == 1


def test_a_version_for_another_torch_offers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "2.8.0", "2.13.0+cpu")
    assert "ipex" not in {kernel.provider for kernel in XeonBackend().kernels(KernelContext(device=INFO))}


def test_without_it_there_is_no_trace_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert "ipex" not in {kernel.provider for kernel in XeonBackend().kernels(KernelContext(device=INFO))}
