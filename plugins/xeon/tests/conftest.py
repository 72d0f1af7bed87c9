"""Kernels are tested at every ISA level that this machine has."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sglang_xeon import isa

CSRC = Path(__file__).parents[1] / "csrc"
EMULATE = bool(os.environ.get("SGLANG_XEON_TEST_EMULATE"))  # set by test_emulated.py
HOST = isa.LEVELS[-1] if EMULATE else isa.host()
HERE: tuple[str, ...] = isa.LEVELS[: isa.LEVELS.index(HOST) + 1] if HOST else ()
if EMULATE:
    HERE = ("avx512", "avx512_bf16", "amx")  # avx2 needs no emulation


def pytest_configure() -> None:
    if EMULATE:
        path, load = build_emulation(), torch.ops.load_library
        torch.ops.load_library = lambda _: load(str(path))  # type: ignore[method-assign]
        isa.host = lambda: HOST
    import sglang_xeon.library  # noqa: F401  loads the kernels, real or emulated


def build_emulation() -> Path:
    """The library with EMULATE_AVX512, in seconds."""
    folder, torch_dir = Path(tempfile.mkdtemp()), Path(torch.__file__).parent
    atexit.register(shutil.rmtree, folder)
    flags = ["-std=c++17", "-O1", "-ffp-contract=fast", "-fPIC", "-Wno-psabi", "-DEMULATE_AVX512"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{torch_dir / 'include'}"]
    flags += [f"-I{torch_dir / 'include/torch/csrc/api/include'}"]
    compiler = os.environ.get("CXX", "g++")
    jobs = [
        subprocess.Popen([compiler, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")])
        for source in CSRC.glob("*.cpp")
    ]
    failed = [job.args for job in jobs if job.wait() != 0]
    assert not failed, "the emulated kernels do not compile"
    out = folder / "emulated.so"
    objects = [str(o) for o in folder.glob("*.o")]
    subprocess.run([compiler, "-shared", *objects, f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-o", str(out)], check=True)
    return out


def pytest_report_header() -> str:
    missing = [name for name in isa.LEVELS if name not in HERE]
    how = " (emulated)" if EMULATE else ""
    return f"xeon kernels run at {', '.join(HERE)}{how}; this CPU cannot run {', '.join(missing) or 'no others'}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "level" in metafunc.fixturenames:
        metafunc.parametrize("level", HERE, indirect=True)


@pytest.fixture
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Kernels run at this level during the test."""
    from sglang_xeon import library  # after pytest_configure has chosen which kernels to load

    library.set_isa(request.param)
    yield request.param
    library.set_isa(HOST or "avx2")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
