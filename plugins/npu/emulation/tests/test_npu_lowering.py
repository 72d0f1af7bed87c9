"""The recurrent kernels become what the vendor's compiler takes, by triton-ascend's own passes, with no device and no CANN."""

from __future__ import annotations

import importlib
import re
import subprocess
from dataclasses import replace

import pytest
from sglang_npu import triton_ascend

pytest.importorskip("triton.backends.ascend", reason="triton-ascend is not installed")
from sglang_npu_emulation.lowering import lowered
from sglang_triton import sampling
from sglang_triton.aot_spec import AotSpec

SPECS = [spec for fn in triton_ascend.FUNCTIONS.values() for spec in importlib.import_module(fn.partition(":")[0]).AOT]
MATRICES = {"_prepare", "_scan"}  # kernels with products, which run on cube cores beside vector cores
TRITON_LEFT = re.compile(r"\btt\.(?!divisibility|tensor_kind)\w+")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.title)
def test_a_kernel_becomes_linalg(spec: AotSpec) -> None:
    """Nothing of Triton is left in it, and it is for the cores that it needs."""
    module, name = lowered(spec), spec.kernel.__name__
    assert f"func.func @{name}(" in module and not TRITON_LEFT.findall(module)
    assert ("linalg.matmul" in module) == (name in MATRICES)
    assert f'mix_mode = "{"mix" if name in MATRICES else "aiv"}"' in module


def test_sampling_is_not_offered_for_its_last_kernel_does_not_become_linalg() -> None:
    """Once it does, offer it: until then sample.sample is PyTorch's operators."""
    assert "sample.sample" not in triton_ascend.FUNCTIONS
    tiles = {"BLOCK_R": 1, "CHUNK": 4096, "BLOCK_S": 64}
    pick = next(spec for spec in sampling.AOT if spec.kernel is sampling._pick)
    with pytest.raises(subprocess.CalledProcessError) as failure:
        lowered(replace(pick, fixed=tiles))
    assert b"parseSelect" in failure.value.stderr
