"""`JittedStep` by itself: which batches are of a bucket, what is lifted, and where compiled programs are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("jax")

from sglang_tpu.environment import environment, to_host
from sglang_tpu.step import JittedStep

from sglang_core.api import DeviceError


@dataclass
class Batch:
    x: Tensor
    factor: int = 1
    more: Tensor | None = None


@dataclass
class State:
    total: Tensor

    def mutable_tensors(self) -> Iterator[Tensor]:
        yield self.total


def add(state: Any, batch: Batch) -> Tensor:
    y = batch.x * batch.factor
    if batch.more is not None:
        y = y + batch.more
    state.total.add_(y.sum())
    return y


@pytest.fixture
def state() -> State:
    return State(torch.zeros(()))


def test_variants_of_a_bucket_are_compiled_when_they_come(state: State, caplog: pytest.LogCaptureFixture) -> None:
    step = JittedStep(add, state, 2, strict=True)
    for size in (2, 4):
        step(Batch(torch.ones(size)))
    assert step(Batch(torch.ones(4), factor=3)).tolist() == [3.0] * 4
    assert step(Batch(torch.ones(2), more=torch.ones(2))).tolist() == [2.0, 2.0]
    step(Batch(torch.zeros(2)))
    assert step.num_programs == 4 and not caplog.records
    with environment():
        assert float(to_host(state.total)) == 2 + 4 + 12 + 4


def test_a_batch_of_no_bucket_is_an_error_or_a_warning(state: State, caplog: pytest.LogCaptureFixture) -> None:
    strict, lenient = (JittedStep(add, state, 1, strict=strict) for strict in (True, False))
    for step in (strict, lenient):
        step(Batch(torch.ones(2)))
    with pytest.raises(DeviceError, match=r"no bucket \(x \[3\]"):
        strict(Batch(torch.ones(3)))
    assert strict.num_programs == 1 and not caplog.records
    assert lenient(Batch(torch.ones(3))).tolist() == [1.0] * 3
    assert lenient.num_programs == 2 and "no bucket" in caplog.text


def test_without_buckets_every_batch_is_welcome(state: State, caplog: pytest.LogCaptureFixture) -> None:
    step = JittedStep(add, state, 0, strict=True)
    for size in (1, 2, 3):
        step(Batch(torch.ones(size)))
    assert step.num_programs == 3 and not caplog.records


PROGRAM = """
import jax
from sglang_core.api import DeviceInfo
from sglang_tpu.opened import open_devices
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
open_devices([DeviceInfo(backend="tpu", path="tpu/cpu", name="host", facts={"emulated": True})])
jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(8)).block_until_ready()
print(sum("cache_hits" in name for name in hits))
"""


def test_compiled_programs_are_kept_where_asked(tmp_path: Path) -> None:
    def hits(folder: str) -> int:
        environ = {**os.environ, "SGLANG_TPU_CACHE": folder, "XDG_CACHE_HOME": str(tmp_path / "home")}
        environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept = tmp_path / "kept"
    assert hits(str(kept)) == 0 and any(kept.iterdir())
    assert hits(str(kept)) > 0
    assert hits("") == hits("0") == 0 and not (tmp_path / "home").exists()
