"""The provider and the device that interprets: what they say, and when they are there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from sglang_triton.backend import TritonBackend
from sglang_triton.gluon_limits import ARCHS
from sglang_triton.kernels import FORMATS, KERNELS, PROFILES, QUANTISED, state_limits

from sglang_core.api import Claims, DeviceInfo, KernelContext, OpSite, SelectionContext, Support
from sglang_core.api.ops import GatedDeltaSpec
from sglang_core.backend.devices import installed_backends, open_device
from sglang_core.backend.providers import Providers
from sglang_core.errors import DeviceError

OPS = {kernel.op for kernel in KERNELS}
PROVIDERS = ("triton", *ARCHS)


def context(path: str) -> KernelContext:
    return KernelContext(device=DeviceInfo(backend=path.split("/")[0], path=path, name="a device"))


def test_it_is_there_only_where_triton_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [info.label for info in TritonBackend().probe()] == ["triton:0"]
    monkeypatch.delenv("TRITON_INTERPRET")
    assert TritonBackend().probe() == []
    with pytest.raises(DeviceError, match="TRITON_INTERPRET=1"):
        open_device("triton")


def test_it_is_emulated_and_never_taken_unasked() -> None:
    (row,) = [row for row in installed_backends() if row.name == "triton"]
    assert row.devices[0].facts["emulated"] and row.devices[0].score < 0


@pytest.mark.parametrize("path", ["cuda/sm_90", "rocm/gfx942", "triton/interpreter"])
def test_devices_get_every_kernel_once(path: str) -> None:
    """Those in Gluon are for NVIDIA's alone."""
    found = [kernel for kernel in Providers().kernels(context(path)) if kernel.provider in PROVIDERS]
    mine = [kernel for kernel in KERNELS if kernel.provider not in ARCHS or path.startswith("cuda")]
    assert [kernel.fn for kernel in found] == [kernel.fn for kernel in mine]


@pytest.mark.parametrize("path", ["cpu", "xeon/avx512", "cudalike/v1"])
def test_other_devices_get_none(path: str) -> None:
    assert not [kernel for kernel in Providers().kernels(context(path)) if kernel.provider in PROVIDERS]


def test_every_kernel_is_claimed_in_every_dtype() -> None:
    claims: Claims = TritonBackend().claims(context("triton/interpreter"))
    for op in OPS:
        for dtype in ("float32", "bfloat16", "float16"):
            for fmt in FORMATS.get(op, ("*",)):
                assert claims.support(op, fmt=fmt, dtype=dtype) is Support.NATIVE
    assert claims.support("no.such_op", dtype="bfloat16") is Support.REFERENCE


@pytest.mark.parametrize(("dim", "reason"), [(128, None), (192, "takes keys of at most 128 dims, not 192")])
def test_states_that_are_too_long_are_refused(dim: int, reason: str | None) -> None:
    heads = {"num_k_heads": 1, "num_v_heads": 2, "k_head_dim": dim, "v_head_dim": 64}
    spec = GatedDeltaSpec(**heads, conv_width=4, scale=1.0)
    site = OpSite(op="ssm.gated_delta_rule", layer="GatedDeltaNet", dtype="bfloat16", spec=spec)
    device = DeviceInfo(backend="cuda", path="cuda/sm_90", name="a device")
    assert state_limits(SelectionContext(device=device, site=site)) == reason


def test_profiles_are_those_of_kernels_and_of_the_device() -> None:
    stated = TritonBackend().claims(context("triton/interpreter")).profiles
    assert stated == ("base", *PROFILES)
    quantised = [name.removeprefix("quant:") for name in PROFILES if name.startswith("quant:")]
    assert quantised and set(quantised) <= set(QUANTISED)


def test_listing_devices_imports_neither_torch_nor_triton() -> None:
    code = (
        "import sys, sglang_triton.backend as b, sglang_triton.provider; b.TritonBackend().probe();"
        " print([name for name in ('torch', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"
