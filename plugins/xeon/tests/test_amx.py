"""AMX tiles: emulated wherever the CPU has none; and that the real build has the instructions."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from sglang_xeon import gemm
from tolerance import assert_close

from sglang_core.api.ops import OPS, PackedWeight

LINEAR, QUANTIZE = OPS["gemm.linear"].body, OPS["quant.quantize"].body
ISA_AMX = Path(__file__).parents[1] / "csrc" / "isa_amx.cpp"
FORMATS = ["dense", "int8.token_channel", "int8.token_channel.asym", "int4.awq.g32", "int4.pack.g128", "fp8.block128"]
FORMATS += ["fp8.token_channel", "mxfp4.g32", "w4a8_fp8.g128", "nvfp4.g16", "int4.gptq.g32.act_order"]
# Rows: below a tile, one, one and a bit, two, and past a row block. Columns: one panel, and panels that fill no pair. k: below a
# step, whole steps, a tail, and past a block of depth.
SHAPES = [(15, 48, 64), (16, 16, 32), (17, 33, 48), (32, 80, 96), (31, 64, 544), (100, 17, 1104)]


@pytest.fixture
def amx(level: str) -> None:
    if level != "amx":
        pytest.skip("a level without tiles")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_tiles_give_the_body(amx: None, fmt: str, m: int, n: int, k: int) -> None:
    x, w = torch.randn(m, k).bfloat16(), QUANTIZE(torch.randn(n, k).bfloat16(), fmt)
    wide = QUANTIZE(w["weight"].double(), fmt) if fmt == "dense" else w
    want = LINEAR(x.double(), wide).bfloat16()
    assert_close(gemm.linear_amx(x, gemm.pack(w)), want, scale=k**0.5)


@pytest.mark.parametrize("k", [1, 7, 31, 33, 513])
def test_odd_depths(amx: None, k: int) -> None:
    """Rows that end within a step, on weights whose neighbours are infinite."""
    x, weight = torch.randn(20, k).bfloat16(), torch.randn(40, k).bfloat16()
    weight[16:] = float("inf")
    w = PackedWeight("dense", {"weight": weight}, out_features=40, in_features=k)
    got = gemm.linear_amx(x, gemm.pack(w))
    assert_close(got[:, :16], (x.double() @ weight[:16].double().T).bfloat16(), scale=k**0.5)


def test_tiles_sum_in_an_order_of_their_own(amx: None) -> None:
    """So that this file tests them at all: float32 sums that depend on their order differ somewhere."""
    x, w = torch.randn(32, 1024).bfloat16(), torch.randn(64, 1024).bfloat16()
    packed = gemm.pack(PackedWeight("dense", {"weight": w}, out_features=64, in_features=1024))
    assert not torch.equal(gemm.linear_amx(x.bfloat16(), packed), gemm.linear(x, packed))


@pytest.mark.skipif(shutil.which("objdump") is None or shutil.which("g++") is None, reason="needs g++ and objdump")
def test_the_real_build_has_the_instructions(tmp_path: Path) -> None:
    built = tmp_path / "amx.o"
    subprocess.run(["g++", "-std=c++17", "-O2", "-c", str(ISA_AMX), "-o", str(built)], check=True)
    code = subprocess.run(["objdump", "-d", str(built)], capture_output=True, text=True, check=True).stdout
    for instruction in ("ldtilecfg", "tileloadd", "tilestored", "tdpbf16ps", "tdpbusd", "tilerelease"):
        assert instruction in code
