"""Which device each rank of each replica opens."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.interface import Backend, DeviceInfo, DeviceRuntime, MeshContext, RuntimeContext
from sglang_core.backend.placement import Placement, place
from sglang_core.config import EngineConfig
from sglang_core.engine.build import build_rank
from sglang_core.errors import DeviceError


class Cards(Backend):
    """Two kinds of cards, the best not the first; `one_process`: it drives all ranks of a replica."""

    name = "acme"
    one_process = False

    def probe(self) -> list[DeviceInfo]:
        paths = ["acme/old", "acme/new", "acme/new", "acme/old", "acme/new", "acme/new"]
        infos = [DeviceInfo(backend="acme", index=i, path=path, name="a card") for i, path in enumerate(paths)]
        return sorted(infos, key=lambda info: info.path)

    def mesh(self, ctx: MeshContext) -> tuple[DeviceInfo, ...]:
        first = ctx.device.index
        alike = [info for info in self.probe() if info.path == ctx.device.path and info.index >= first]
        return tuple(alike[: ctx.num_ranks]) if self.one_process else ()

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        raise Opened(ctx)


class Opened(Exception):
    """What a runtime would be opened with: nothing is."""

    @property
    def ctx(self) -> RuntimeContext:
        found: RuntimeContext = self.args[0]
        return found


class Host(Cards):
    def probe(self) -> list[DeviceInfo]:
        return [DeviceInfo(backend="acme", path="acme/host", name="a host")]

    def shared_by_ranks(self, info: DeviceInfo) -> bool:
        return True


def chosen(backend: Backend, index: int | None = None) -> ChosenDevice:
    infos = backend.probe()
    info = infos[0] if index is None else next(info for info in infos if info.index == index)
    return ChosenDevice(backend=backend, info=info, reason="a test")


def indices(placed: Placement) -> list[int]:
    return [info.index for info in placed.devices]


def test_each_rank_of_each_replica_opens_a_device_of_its_own() -> None:
    """Of the kind of the best one, or of the one asked for, and from that on."""
    sizes = {"tp_size": 2, "dp_size": 2}
    placed = [place(chosen(Cards()), replica=r, rank=k, **sizes) for r in range(2) for k in range(2)]
    assert [indices(each) for each in placed] == [[1], [2], [4], [5]]
    assert all((each.share, each.num_shares) == (0, 1) for each in placed)
    assert [indices(place(chosen(Cards(), 2), tp_size=3, rank=k)) for k in range(3)] == [[2], [4], [5]]
    assert [indices(place(chosen(Cards(), 0), tp_size=2, rank=k)) for k in range(2)] == [[0], [3]]


def test_a_process_that_drives_all_ranks_has_those_of_its_replica() -> None:
    backend = Cards()
    backend.one_process = True
    assert [indices(place(chosen(backend), tp_size=2, dp_size=2, replica=r)) for r in range(2)] == [[1, 2], [4, 5]]


def test_a_host_is_all_ranks_and_each_knows_its_share() -> None:
    placed = [place(chosen(Host()), tp_size=2, dp_size=3, replica=r, rank=k) for r in range(3) for k in range(2)]
    assert all(indices(each) == [0] and each.num_shares == 6 for each in placed)
    assert [each.share for each in placed] == list(range(6))


@pytest.mark.parametrize(
    ("index", "sizes", "message"),
    [
        (None, {"tp_size": 8}, r"tp_size=8 takes 8 devices like acme:1 \(acme/new\) and there are 4 from it on"),
        (
            4,
            {"tp_size": 2, "dp_size": 2},
            r"tp_size=2 times dp_size=2 takes 4 .* 2 .*\(acme:4, acme:5\); lower --tp-size or --dp",
        ),
    ],
)
def test_too_few_devices_are_named(index: int | None, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        place(chosen(Cards(), index), **sizes)


def test_a_rank_is_built_on_its_own_device() -> None:
    settings: dict[str, Any] = {"model_path": "demo", "dtype": "float32", "tp_size": 2, "dp_size": 2}
    with pytest.raises(Opened) as opened:
        build_rank(
            EngineConfig.from_flat(**settings),
            1,
            world_size=2,
            directory=None,
            progress=False,
            replica=1,
            device=chosen(Cards()),
        )
    ctx = opened.value.ctx
    assert ([info.index for info in ctx.devices], ctx.rank, ctx.world_size) == ([5], 1, 2)
