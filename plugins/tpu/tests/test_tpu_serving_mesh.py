"""Serving over a mesh: one process, devices that nobody had to ask for, programs compiled once, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("jax")

import jax
import numpy as np
import torch
from jax.sharding import Mesh
from sglang_tpu import step
from sglang_tpu.backend import HOST, TpuBackend
from sglang_tpu.environment import array
from sglang_tpu.join import join_models
from sglang_tpu.mesh import AXIS
from sglang_tpu.opened import open_devices
from sglang_tpu.runtime import TpuRuntime
from torch import nn

from sglang_core import Engine
from sglang_core.api import DeviceError, DeviceInfo, MeshContext, PluginError, RuntimeContext

SETTINGS: dict[str, Any] = {
    "model_path": "demo",
    "dtype": "float32",
    "max_running_requests": 1,
    "context_length": 32,
    "chunked_prefill_size": 16,
    "max_total_tokens": 48,
}
PROMPTS = ["The capital of France is", "One, two, three"]
GREEDY = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


def host(num_ranks: int) -> tuple[DeviceInfo, ...]:
    info = next(info for info in TpuBackend().probe() if info.path == HOST)
    return TpuBackend().mesh(MeshContext(device=info, num_ranks=num_ranks))


def mesh_of(num_ranks: int) -> Mesh:
    return Mesh(np.array(open_devices(host(num_ranks))), (AXIS,))


def test_a_process_a_replica_serves_and_finds_its_devices_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user starts them: nothing in the environment says that the host is two devices."""
    monkeypatch.delenv("XLA_FLAGS")
    with Engine(device="cpu", in_process=True, **SETTINGS) as reference:
        expected = [answer["output_ids"] for answer in reference.generate(PROMPTS, GREEDY)]
    with Engine(device="tpu:cpu", tp_size=2, dp_size=2, **SETTINGS) as engine:
        assert [len(each._link.pids) for each in engine.client.engines] == [1, 1]  # type: ignore[attr-defined]
        assert [answer["output_ids"] for answer in engine.generate(PROMPTS, GREEDY)] == expected


def test_every_program_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first steps give lies as what they were given: else each program would be compiled again for it."""
    programs: list[step.Program] = []
    make = step.Program.__init__
    monkeypatch.setattr(step.Program, "__init__", lambda self, *args: (programs.append(self), make(self, *args))[1])
    with Engine(device="tpu:cpu", tp_size=2, in_process=True, **SETTINGS) as engine:
        for _ in range(2):
            engine.generate(PROMPTS[0], GREEDY)
    assert len(programs) > 2
    assert [program._run._cache_size() for program in programs] == [1] * len(programs)


def test_a_device_holds_its_ranks_part_and_the_host_none() -> None:
    over = mesh_of(2)
    ranks = [nn.Linear(2, 3), nn.Linear(2, 3, bias=False)]
    weights, bias = [rank.weight.detach().clone() for rank in ranks], ranks[0].bias.detach().clone()
    given = iter(ranks)
    joined = join_models(given, over)
    assert joined is ranks[0] and ranks[1].weight is None
    for name, parts in (("weight", weights), ("bias", [bias, torch.zeros(3)])):
        held = sorted(array(getattr(joined, name)).addressable_shards, key=lambda shard: shard.device.id)
        assert [shard.device for shard in held] == list(over.devices)
        assert all(np.array_equal(shard.data, part.numpy()) for shard, part in zip(held, parts, strict=True))


def test_a_tensor_of_two_modules_stays_one() -> None:
    ranks = [nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)) for _ in range(2)]
    for rank in ranks:
        rank[1].weight = rank[0].weight
    joined = join_models(iter(ranks), mesh_of(2))
    assert joined[0].weight is joined[1].weight


def test_unequal_parts_are_the_models_error() -> None:
    ranks = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 4))
    with pytest.raises(PluginError, match=r"0.weight: ranks of a mesh hold equal parts.* \[\[3, 2\], \[4, 2\]\]"):
        join_models(iter(ranks), mesh_of(2))


def test_memory_of_the_host_is_shared_by_its_devices() -> None:
    one, four = (TpuRuntime(RuntimeContext(devices=host(n)), open_devices(host(n))).memory() for n in (1, 4))
    assert four.total == pytest.approx(one.total / 4, rel=0.1)


def test_too_many_ranks_for_a_process_that_has_begun() -> None:
    wanted = len(jax.devices("cpu")) + 1
    with pytest.raises(
        DeviceError, match=rf"{wanted} ranks: .* set XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
    ):
        open_devices(host(wanted))


def test_single_ops_of_a_mesh_cannot_be_watched() -> None:
    with pytest.raises(DeviceError, match="a step over 2 ranks is one program; leave out --tp-size"):
        TpuRuntime(RuntimeContext(devices=host(2), watched=True), open_devices(host(2)))
