"""What is listed, without jax being imported: these run on every machine."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
from sglang_tpu import backend
from sglang_tpu.backend import TpuBackend


def test_the_host_is_a_device_that_is_never_taken_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "version", {"jax": "0.10.2", "torchax": "0.0.13"}.__getitem__)
    (info,) = TpuBackend().probe()
    assert (info.label, info.path) == ("tpu:0", "tpu/cpu") and info.score < 0 and info.facts["emulated"]
    assert info.versions == {"jax": "0.10.2", "torchax": "0.0.13"}


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
