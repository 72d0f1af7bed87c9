"""Collectives of a mesh, held to the suite's cases: ours pass, a wrong one is seen, and what no mesh has is not held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("jax")

from sglang_conformance.rank_host import RankHost
from sglang_conformance.result import Result, Verdict
from sglang_conformance.runner import Suite
from sglang_tpu.backend import HOST, TpuBackend
from sglang_tpu.mesh import MeshCommunicator
from sglang_tpu.opened import open_devices
from sglang_tpu.runtime import TpuRuntime

from sglang_core.api import Communicator, DeviceRuntime, RuntimeContext


class Averages(MeshCommunicator):
    def all_reduce(self, x: Tensor) -> Any:
        return super().all_reduce(x) / self.size


class AveragingRuntime(TpuRuntime):
    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        return Averages(rank, len(ranks))


class AveragingBackend(TpuBackend):
    """Under a name in this module, by which the process that runs a mesh finds it."""

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        return AveragingRuntime(ctx, open_devices(ctx.devices))


@dataclass
class Judge:
    """Suites that share the process that runs meshes, and with it the import of torch."""

    host: RankHost

    def __call__(self, backend: TpuBackend, *titles: str) -> list[Result]:
        info = next(info for info in backend.probe() if info.path == HOST)
        suite, mine = Suite(backend, info, kernels=[], full=False), RankHost(backend, None, info)
        mine._process = self.host.process()
        suite.__dict__["_rank_host"] = mine
        return [suite.judge(*work) for work in suite.select(titles)]


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    host = RankHost(TpuBackend(), None)
    yield Judge(host)
    host.close()


MOST = (
    "comm.all_reduce[odd sizes, 2 ranks-bf",
    "comm.all_reduce[strides",
    "comm.reduce_scatter[by columns, 3",
    "comm.all_gather[by rows, 2",
)
MOVES = ("comm.all_to_all[empty, 3 ranks-float32", "comm.broadcast[odd sizes, 2 ranks-int32")


@pytest.mark.parametrize("title", [*MOST, *MOVES])
def test_collectives_pass(title: str, judge: Judge) -> None:
    (found,) = judge(TpuBackend(), title)
    assert found.verdict is Verdict.EMULATED, found.reason


def test_a_wrong_one_fails(judge: Judge) -> None:
    (found,) = judge(AveragingBackend(), "comm.all_reduce[odd sizes, 2 ranks-float32")
    assert found.verdict is Verdict.FAIL and "sums" in found.reason


@pytest.mark.parametrize(
    ("title", "why"),
    [
        ("comm.p2p[odd sizes, 2 ranks-float32", "in which none sends alone"),
        ("comm.failure[a rank dies, 2", "none of them dies alone"),
        ("comm.order[of two streams, 2", "the communicator that it was bound with"),
    ],
)
def test_what_no_mesh_has_is_not_held(title: str, why: str, judge: Judge) -> None:
    (found,) = judge(TpuBackend(), title)
    assert found.verdict is Verdict.NOT_CLAIMED and why in found.reason
