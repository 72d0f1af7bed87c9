"""The AVX-512, BF16 and AMX kernels on a machine without them: the same source, compiled to pairs of AVX2 registers.

Checks all of their code but the instructions that only they have, and speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from sglang_xeon import isa

NAMES = (
    *("gemm", "gemm_formats", "exponents", "amx", "attention", "shared_attention", "latent_attention"),
    *("ragged_attention", "rows", "moe", "route", "lora_apply", "sampling", "logits"),
)
TESTS = [str(Path(__file__).with_name(f"test_{name}.py")) for name in NAMES]


@pytest.mark.timeout(900)
@pytest.mark.skipif(isa.host() in (None, isa.LEVELS[-1]), reason="this CPU runs every level as it is, or none")
def test_other_levels_emulated() -> None:
    env = os.environ | {"SGLANG_XEON_TEST_EMULATE": "1", isa.ENV: "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", "pytest", "-x", *TESTS], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
