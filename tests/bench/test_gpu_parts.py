"""`benchmarks/gpu/run.sh` on a host: each part at tiny sizes, through the script that a GPU machine runs. Figures are not looked at."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.build import compiled
from benchmarks.gpu.conformance import promoted
from benchmarks.gpu.kernels import difference
from sglang_core.api import Kernel

ROOT = Path(__file__).parents[2]


def run(out: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """With nothing of this repository on the path but what the script puts there."""
    environ = os.environ | {"PYTHON": sys.executable, "SITE": str(out / "site"), "OUT": str(out / "results")}
    environ["TMPDIR"] = str(out)  # where checkpoints are kept for the next run
    environ.pop("PYTHONPATH", None)
    command = ["bash", str(ROOT / "benchmarks/gpu/run.sh"), *args, "--device", "cpu", "--small"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=240)


def results(out: Path, part: str) -> Any:
    return json.loads((out / "results" / f"{part}.json").read_text())


def test_kernels(tmp_path: Path) -> None:
    """Bytes decide the floor of a norm; the plot and the file are there; a second run measures the limits alone."""
    done = run(tmp_path, "kernels", "--only", "norm.add_rms")
    assert done.returncode == 0, done.stdout + done.stderr
    first = results(tmp_path, "kernels")
    (name,) = (name for name in first["done"] if name != "limits")
    facts = first["done"][name]
    assert facts["bound"] == "memory"
    assert facts["reached"] == pytest.approx(facts["floor_us"] / facts["us"])
    assert facts["floor_us"] == pytest.approx(1e6 * facts["nbytes"] / first["done"]["limits"]["copy"])
    assert first["about"]["small"]
    assert (tmp_path / "results" / "kernels.png").stat().st_size > 1000


def test_conformance_stops_and_goes_on(tmp_path: Path) -> None:
    """A limit that is over at once lets one case through; the next run does the rest."""
    done = run(tmp_path, "conformance", "--limit", "0", "--only", "act.gated[")
    assert done.returncode == 3, done.stdout + done.stderr
    ran = results(tmp_path, "conformance")["done"]["summary"]
    assert 0 < ran["ran"] < ran["of"]
    done = run(tmp_path, "conformance", "--only", "act.gated[", "--keep")
    assert done.returncode == 0, done.stdout + done.stderr
    whole = results(tmp_path, "conformance")["done"]["summary"]
    assert whole["ran"] == whole["of"] == ran["of"]
    assert whole["fails"] == {}


def test_engine(tmp_path: Path) -> None:
    done = run(tmp_path, "engine", "--only", "decode")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path, "engine")["done"]
    assert found["decode step, batch 1"]["floor_ms"] < found["decode step, batch 1"]["ms"]
    assert found["decode, gap between steps"]["batch"] == 4


def test_short_prefills(tmp_path: Path) -> None:
    """A host captures none: the same steps twice."""
    done = run(tmp_path, "engine", "--only", "short prefills")
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(tmp_path, "engine")["done"]["short prefills, llama-tiny"]
    assert found["captured"] == 0
    for tokens in (4, 16):
        assert found[f"gain_{tokens}"] == pytest.approx(found[f"eager_{tokens}_ms"] / found[f"graph_{tokens}_ms"])


def test_build() -> None:
    """Compiled for an architecture that is not here, in a process of its own, and held to its budget."""
    pytest.importorskip("triton")
    facts = compiled("norm.rms[M=128]", "sm_90")
    assert facts["arch"] == "sm_90"
    assert facts["registers"] > 0
    assert facts["over_budget"] == ""
    with pytest.raises(RuntimeError, match="StopIteration"):
        compiled("no.such_kernel", "sm_90")


def test_a_device_that_is_not_here_is_said(tmp_path: Path) -> None:
    environ = os.environ | {"PYTHON": sys.executable, "SITE": str(tmp_path / "site"), "OUT": str(tmp_path)}
    command = ["bash", str(ROOT / "benchmarks/gpu/run.sh"), "kernels", "--device", "no-such-device"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=120)
    assert done.returncode == 2
    assert "no installed plugin provides device 'no-such-device'" in done.stderr


def test_make_ends_at_the_first_part_where_there_is_no_such_device(tmp_path: Path) -> None:
    environ = os.environ | {"SITE": str(tmp_path / "site"), "OUT": str(tmp_path)}
    command = ["make", "-o", "install", "test-gpu", "GPU=no-such-device", f"PY={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=120, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("no installed plugin provides device 'no-such-device'") == 1


def test_a_provider_that_nothing_takes_is_judged_as_if_it_were_the_first_choice() -> None:
    kernels = [
        Kernel("attn.ragged", provider="first", fn="a:b", device=("cuda",)),
        Kernel("attn.ragged", provider="last", fn="c:d", device=("cuda",), priority=10),
        Kernel("norm.rms", provider="first", fn="e:f", device=("cuda",)),
    ]
    made, ops = promoted(kernels, "last")
    assert ops == {"attn.ragged"}
    assert max(made, key=lambda kernel: kernel.priority).provider == "last"
    assert made[::2] == kernels[::2]


def test_results_are_compared_by_the_size_of_their_numbers() -> None:
    x = torch.tensor([3.0, 4.0, -3.0, -4.0])
    assert difference(x, x) == 0
    assert difference(x + torch.tensor([0.0, 1.0, 0, 0]), x) == pytest.approx(1 / 12.5**0.5)
    assert math.isnan(difference(x * torch.nan, x))
