"""That no kernel and no config goes without a compilation ahead of time, and that those of one architecture keep their budgets."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sglang_triton import aot
from sglang_triton.aot import Usage
from sglang_triton.kernels import KERNELS
from sglang_triton.tuning import ARCHS, ASCEND, INTERPRETER, choose_for, nearest, table

BUDGETS = Path(__file__).parents[3] / "benchmarks" / "gpu" / "budgets.json"


HOST_OPS = ("attn.plan", "attn.mla_plan", "ssm.plan")  # of host integers: nothing to compile


def test_every_op_has_a_compilation() -> None:
    assert {kernel.op for kernel in KERNELS} - set(HOST_OPS) <= {spec.op for spec in aot.specs()}


@pytest.mark.parametrize("module", sorted({kernel.fn.split(":")[0] for kernel in KERNELS}))
def test_every_jitted_function_that_is_launched_is_compiled(module: str) -> None:
    """By name: a kernel's name begins with an underscore, and helpers' names do not."""
    loaded = importlib.import_module(module)
    kernels = {name for name, value in vars(loaded).items() if name.startswith("_") and hasattr(value, "arg_names")}
    assert kernels <= {spec.kernel.__name__ for spec in loaded.AOT}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_config_is_compiled(arch: str) -> None:
    """An entry that no `AotSpec` asks for would be seen first on a device."""
    for op, entries in table(arch).items():
        found = [
            dict(spec.config(arch))
            for spec in aot.specs()
            if (spec.tuned_as or spec.op) == op and arch in (spec.archs or ARCHS)
        ]
        for entry in entries:
            assert entry["config"] in found, f"configs/{arch}.json: {op} {entry} is compiled by no AotSpec"


@pytest.mark.parametrize("arch", [*ARCHS, INTERPRETER])
def test_every_architecture_knows_every_op(arch: str) -> None:
    assert set(table(arch)) == set(table("sm_90"))
    for op, entries in table(arch).items():
        assert "up_to" not in entries[-1], f"configs/{arch}.json: the last entry of {op} must take any size"


def test_configs_of_npus_are_of_the_kernels_that_npus_are_offered() -> None:
    """Of any size, and with the tiles that others have: launch options are none of an NPU's."""
    launch = {"num_warps", "num_stages"}
    assert set(table(ASCEND)) == {op for op in table("sm_90") if op.startswith("ssm.")}
    for op, (entry,) in table(ASCEND).items():
        assert set(entry) == {"config"} and set(entry["config"]) == set(table("sm_90")[op][0]["config"]) - launch


def test_the_first_entry_that_is_large_enough_is_chosen() -> None:
    narrow, wide = (choose_for("sm_90", "act.gated", {"F": width}) for width in (512, 513))
    assert narrow["BLOCK_T"] > wide["BLOCK_T"]


def test_a_device_takes_the_configs_of_the_newest_that_is_older() -> None:
    assert [nearest(a) for a in ("sm_86", "sm_90", "sm_120", "gfx942", "gfx950")] == [
        *("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
    ]
    assert nearest("Ascend910B4") == nearest("ascend910_9391") == ASCEND
    for arch in ("sm_75", "gfx90a", "gfx1100"):
        with pytest.raises(RuntimeError, match="no kernel configs"):
            nearest(arch)


def test_what_exceeds_a_budget_is_found() -> None:
    usage = Usage(registers=41, spills=0, shared=70_000)
    budget = {"registers": 40, "spills": 0, "shared": 70_000}
    assert list(aot.problems_of(usage, budget, "sm_90")) == ["41 registers, and its budget is 40"]
    assert "70000 bytes of shared memory" in next(aot.problems_of(usage, budget, "gfx942"))
    assert "no budget" in next(aot.problems_of(usage, None, "sm_90"))


def test_budgets_are_of_what_there_is() -> None:
    budgets = json.loads(BUDGETS.read_text())
    assert set(budgets) == set(ARCHS)
    for arch in ARCHS:
        assert set(budgets[arch]) == {s.title for s in aot.specs() if not s.archs or arch in s.archs}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch, only", [("sm_90", ""), ("sm_100", "[blackwell")])
def test_each_kernel_keeps_its_budget_once(arch: str, only: str) -> None:
    """On one architecture, in a process of its own that does not interpret; `make test-slow` compiles all of it."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sglang_triton.aot", "--arch", arch, "--only", only, "--check", str(BUDGETS)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kernels_of_every_architecture_keep_their_budgets() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sglang_triton.aot", "--check", str(BUDGETS)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
