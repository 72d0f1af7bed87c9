"""Ranks that one process drives: how many processes there are, what is loaded when, and what is refused before anything is."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_core import demo
from sglang_core.backend import placement
from sglang_core.backend.communicator import Communicator
from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.interface import DeviceInfo, DeviceRuntime, MemoryInfo, MeshContext, RuntimeContext
from sglang_core.backend.placement import num_processes, place
from sglang_core.backend.torch_backend import TorchBackend
from sglang_core.backend.torch_runtime import TorchRuntime
from sglang_core.config import EngineConfig
from sglang_core.engine.build import build_rank
from sglang_core.engine.mesh import RankOf
from sglang_core.errors import ConfigError, PluginError
from sglang_core.layers.lora import AdapterSlots

MIB = 2**20


class Joined(Exception):
    """What the fake mesh raises once it has every rank's model: it runs none."""


class MeshRuntime(TorchRuntime):
    """Keeps a weight of each rank, and looks how many ranks' models there are at a time."""

    def __init__(self, ctx: RuntimeContext) -> None:
        super().__init__(ctx, "cpu")
        self.parts: list[torch.Tensor] = []
        self.stacks: list[list[list[int]]] = []  # of adapters on the same layer

    def memory(self) -> MemoryInfo:
        return MemoryInfo(total=9 * MIB, free=9 * MIB)

    def communicator(self, ranks: Any, rank: int, store: Any) -> Communicator:
        assert store is None and len(ranks) == len(self.infos)
        return RankOf(rank, len(ranks))

    def join_ranks(self, models: Iterator[Any]) -> Any:
        held: list[weakref.ref[Any]] = []
        for _ in self.infos:
            assert not any(one() for one in held[1:]), "an earlier rank's model is still there; the first one runs"
            model = next(models)
            held.append(weakref.ref(model))
            layer = model.model.layers[0].self_attn.o_proj
            self.parts.append(layer.weight["weight"].clone())
            slots = [module for module in layer.modules() if isinstance(module, AdapterSlots)]
            self.stacks.append([list(stack.shape) for module in slots for stack in module.buffers()])
            del layer, slots
            del model
        raise Joined


class MeshBackend(TorchBackend):
    """`num_given`: devices that its mesh has, None for as many as are asked for."""

    name = "mesh"
    num_given: int | None = None
    runtime: MeshRuntime

    def probe(self) -> list[DeviceInfo]:
        return [DeviceInfo(backend=self.name, path=self.name, name="a mesh")]

    def mesh(self, ctx: MeshContext) -> tuple[DeviceInfo, ...]:
        return (ctx.device,) * (ctx.num_ranks if self.num_given is None else self.num_given)

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        self.runtime = MeshRuntime(ctx)
        return self.runtime


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> ChosenDevice:
    backend = MeshBackend()
    chosen = ChosenDevice(backend=backend, info=backend.probe()[0], reason="a test")
    monkeypatch.setattr(placement, "open_device", lambda device: chosen)
    return chosen


def build(device: ChosenDevice, **settings: Any) -> None:
    room = {"mem_fraction_static": 1.0, "max_running_requests": 1, "chunked_prefill_size": 16, "max_total_tokens": 64}
    config = EngineConfig.from_flat(**{"model_path": "demo", "dtype": "float32", "tp_size": 2} | room | settings)
    build_rank(config, 0, world_size=1, directory=None, progress=False, device=device)


def test_a_mesh_is_one_process_and_others_are_one_a_rank(mesh: ChosenDevice) -> None:
    assert [num_processes("mesh", tp_size=ranks) for ranks in (1, 2, 8)] == [1, 1, 1]
    assert place(mesh, tp_size=1).devices == (mesh.info,)
    mesh.backend.num_given = 0  # type: ignore[attr-defined]
    assert [num_processes("mesh", tp_size=ranks) for ranks in (1, 2, 8)] == [1, 2, 8]


def test_a_mesh_of_another_size_is_the_plugins_error(mesh: ChosenDevice) -> None:
    mesh.backend.num_given = 3  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match="backend 'mesh' gives 3 devices for 2 ranks"):
        num_processes("mesh", tp_size=2)


def test_each_rank_is_loaded_once_the_one_before_is_taken(mesh: ChosenDevice) -> None:
    with pytest.raises(Joined):
        build(mesh, tp_size=4)
    parts = mesh.backend.runtime.parts  # type: ignore[attr-defined]
    assert [list(part.shape) for part in parts] == [[256, 64]] * 4
    assert not any(torch.equal(parts[0], part) for part in parts[1:])


def test_unequal_parts_are_refused_before_anything_is_loaded(mesh: ChosenDevice, tmp_path: Path) -> None:
    """Three blocks of 128 columns share scales; two and one are no parts of one program."""
    facts = json.loads((demo.path() / "config.json").read_text())
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    facts |= {"head_dim": 128, "num_key_value_heads": 4, "intermediate_size": 384, "quantization_config": quantised}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(
        ConfigError, match=r"tp_size=2 cuts .*mlp.*\[384, 256\].*\[256, 256\] and \[128, 256\].* may be 1$"
    ):
        build(mesh, model_path=str(tmp_path), load_format="dummy")
    assert not mesh.backend.runtime.parts  # type: ignore[attr-defined]


def test_each_rank_brings_room_for_its_part_of_adapters(mesh: ChosenDevice) -> None:
    """Of the demo adapter's rank, with two slots: A is cut as the layer's columns are, and B is whole."""
    with pytest.raises(Joined):
        build(mesh, lora_paths=("demo:capitals",), max_loras_per_batch=2)
    (first, *others) = mesh.backend.runtime.stacks  # type: ignore[attr-defined]
    assert [shape[0] for shape in first] == [2, 2, 2] and first[0][2] == 128
    assert others == [first]


def test_memory_is_that_of_one_device(mesh: ChosenDevice) -> None:
    """The demo model has 11 MiB in float32, and a device 9: the fit table counts a rank's part."""
    with pytest.raises(ConfigError, match="does not fit: mesh:0 has .* larger --tp-size"):
        build(mesh, tp_size=1)
    with pytest.raises(Joined):
        build(mesh)
