"""The flags of csrc/all_reduce.cu over many orders of events, and each mistake that they guard against, found."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from all_reduce_model import Broken, Call, Machine, Protocol
from sglang_cuda.all_reduce import HANDLE_BYTES, CudaPeerMemory
from sglang_cuda.build_all_reduce import ARCHITECTURES, SOURCE, command

# Consecutive calls: (grid, two shots). Blocks that sit one out are behind in their flags.
ONE_SHOT = [(2, False), (1, False), (3, False), (3, False), (2, False)]
TWO_SHOTS = [(grid, True) for grid, _ in ONE_SHOT]
MIXED = [(2, False), (1, True), (3, False), (3, True), (2, True), (1, False)]
ELEMENTS = 4


@pytest.mark.parametrize("calls", [ONE_SHOT, TWO_SHOTS, MIXED], ids=["one shot", "two shots", "mixed"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_sums_this_call_in_rank_order(size: int, calls: list[Call]) -> None:
    for seed in range(100):
        machine = Machine(Protocol(), size, calls, ELEMENTS, seed)
        machine.run()
        for call in range(len(calls)):
            want = {i: (call, i, *range(size)) for i in range(ELEMENTS)}
            assert all(results[call] == want for results in machine.results)


@pytest.mark.parametrize(
    ("mistake", "calls"),
    [
        (Protocol(num_slots=1), ONE_SHOT),
        (Protocol(num_slots=1), MIXED),  # two shots alone would do with one: the second meeting is after all sums
        (Protocol(releases=False), ONE_SHOT),
        (Protocol(releases=False), TWO_SHOTS),
        (Protocol(waits=(False, True)), ONE_SHOT),
        (Protocol(waits=(False, True)), TWO_SHOTS),
        (Protocol(waits=(True, False)), TWO_SHOTS),
        (Protocol(last_block_counts=False), ONE_SHOT),
    ],
    ids=str,
)
def test_a_mistake_is_found(mistake: Protocol, calls: list[Call]) -> None:
    def run() -> None:
        for seed in range(100):
            Machine(mistake, 3, calls, ELEMENTS, seed).run()

    with pytest.raises(Broken):
        run()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH: the kernel is not compiled here")
def test_the_kernel_compiles_for_every_architecture(tmp_path: Path) -> None:
    """Six kernels each; orders at the scope of the system are in the code; nothing lives on a stack to speak of."""
    nvcc, library = str(shutil.which("nvcc")), tmp_path / "all_reduce.so"
    done = subprocess.run(command(nvcc, library, "-Xptxas", "-v"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 6 * len(ARCHITECTURES)
    assert max(spilled) <= 8 and max(registers) <= 64  # 32 blocks of 512 threads leave room beside them
    with pytest.raises(OSError, match=r"\w"):  # it loads; what it refuses is an error in words
        CudaPeerMemory(library).open(bytes(HANDLE_BYTES))
    ptx = subprocess.run(
        [nvcc, "-std=c++17", "-arch=compute_90a", "-ptx", "-o", "-", str(SOURCE)],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert "st.release.sys.global.u32" in ptx and "ld.acquire.sys.global.u32" in ptx
