"""The libraries in place of Ascend's driver: generated from what torch_npu names and calls, and good for nothing but an import."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sglang_npu_emulation import stubs


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[str]]:
    """The libraries and their functions, made by a process in which there are none yet."""
    folder = tmp_path_factory.mktemp("stubs")
    code = (
        "import sys; from pathlib import Path; from sglang_npu_emulation import stubs;"
        " print(*stubs.generate(Path(sys.argv[1])), sep='\\n'); print(*stubs.missing_functions(stubs.vendor_libraries()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    *libraries, functions = done.stdout.splitlines()
    return [Path(path) for path in libraries], functions.split()


def test_they_are_what_torch_npu_lacks(generated: tuple[list[Path], list[str]]) -> None:
    libraries, functions = generated
    names = {path.name for path in libraries}
    assert (
        {"libascendcl.so", "libhccl.so"} <= names and "libtorch_cpu.so" not in names and "libtorch_npu.so" not in names
    )
    assert {"aclInit", "aclrtMalloc", "aclrtGetDeviceCount"} <= set(functions)
    assert not [name for name in functions if not name.startswith(("acl", "rt", "Msprof", "_ZN3atb"))]


def test_every_function_fails(generated: tuple[list[Path], list[str]]) -> None:
    """A stub that said 0 would let a call go on with results that nobody wrote."""
    libraries, functions = generated
    made = ctypes.CDLL(str(libraries[0]))
    assert {getattr(made, name)() for name in functions} == {stubs.NO_DEVICE}


def test_without_them_it_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="python -m sglang_npu_emulation.stubs"):
        stubs.load(tmp_path)


def test_torch_npu_imports_and_finds_no_device() -> None:
    import torch_npu

    assert torch_npu.npu.device_count() == 0
    assert "Tensor block_table" not in str(torch.ops.npu.npu_rms_norm.default._schema)
    assert "Tensor? block_table" in str(torch.ops.npu.npu_fused_infer_attention_score_v2.default._schema)


def test_the_plugin_does_not_know_of_the_emulation() -> None:
    code = "import sglang_npu.backend, sglang_npu.runtime, sglang_npu.driver, sys; print('sglang_npu_emulation' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
