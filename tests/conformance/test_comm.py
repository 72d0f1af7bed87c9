"""Collectives over processes: honest ones pass `comm`, each mistake is seen, and no process stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from sglang_conformance import collectives, rank_host
from sglang_conformance.rank import Rank, World, run_reference
from sglang_conformance.rank_host import RankHost
from sglang_conformance.runner import Suite, Verdict
from torch import Tensor

from sglang_core.backend.claims import Claims
from sglang_core.backend.interface import DeviceInfo
from tests.conformance.comm_mutants import MUTANTS, HonestBackend


@pytest.fixture(scope="module")
def suite() -> Iterator[Callable[[HonestBackend], Suite]]:
    """Suites that share the process that starts ranks, and with it the import of torch."""
    host = RankHost(HonestBackend(), 1)

    def make(backend: HonestBackend) -> Suite:
        made = Suite(backend, backend.probe()[0], num_threads=1, kernels=[], full=False)
        mine = RankHost(backend, 1)
        mine._process = host.process()
        made.__dict__["_rank_host"] = mine
        return made

    yield make
    host.close()


MOST = ("odd sizes, 2", "by rows, 2", "by columns, 2", "strides", "comm.order", "a rank dies, 3")


def test_honest_collectives_pass(suite: Callable[[HonestBackend], Suite]) -> None:
    mine = suite(HonestBackend())
    work = [(c, d) for c, d in mine.select(["comm."]) if d is torch.float32 and any(t in c.title(d) for t in MOST)]
    results = [mine.judge(*w) for w in work]
    assert [(r.title, r.reason) for r in results if r.verdict is not Verdict.PASS] == []
    assert len(results) > 10


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_fails(
    name: str,
    suite: Callable[[HonestBackend], Suite],
    kill_table: list[tuple[str, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_host, "GRACE", 8.0)  # who waits for ever shall not do so for long
    backend, text = MUTANTS[name]
    mine = suite(backend())
    work = [(case, dtype) for case, dtype in mine.select([text]) if dtype is torch.float32]
    killer = next((r for r in (mine.judge(*w) for w in work) if r.verdict is Verdict.FAIL), None)
    assert killer is not None, f"{name} lives"
    kill_table.append((name, killer.title, killer.reason))


def test_what_is_not_stated_is_not_held(suite: Callable[[HonestBackend], Suite]) -> None:
    backend = MUTANTS["SkipsTheTail"][0]()
    mine = suite(backend)
    mine.claims = Claims(profiles=("base",))
    case, dtype = mine.select(["comm.all_reduce[odd sizes, 2"])[0]
    found = mine.judge(case, dtype)
    assert (found.verdict, found.works_unclaimed) == (Verdict.NOT_CLAIMED, False)
    assert found.reason


@pytest.mark.parametrize("text", ["comm.all_reduce[odd sizes, 2", "comm.engine"])
def test_a_lone_card_is_not_held_to_several(text: str) -> None:
    """Two ranks on one would be an error of the communicator's, or a wrong result."""

    class Card(HonestBackend):
        def shared_by_ranks(self, info: DeviceInfo) -> bool:
            return False

    backend = Card()
    mine = Suite(backend, backend.probe()[0], num_threads=1, kernels=[], full=True)
    found = mine.judge(*mine.select([text])[0])
    assert found.verdict is Verdict.NOT_CLAIMED
    assert "not run: tp_size=2 takes 2 devices like ranks:0 (ranks) and there are 1" in found.reason


def test_the_process_that_starts_ranks_ends_with_its_owner() -> None:
    host = RankHost(HonestBackend(), 1)
    helper = psutil.Process(host.process().pid)
    host.close()
    assert not helper.is_running() or helper.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_reference_is_what_it_says(size: int) -> None:
    """Against sums and concatenations written out."""

    def program(rank: Rank) -> dict[str, Tensor]:
        x = torch.arange(2.0 * size).view(size, 2) + 100 * rank.rank
        comm = rank.comm
        return {
            "sum": comm.all_reduce(x),
            "all": comm.all_gather(x, dim=0),
            "part": comm.reduce_scatter(x),
            "rows": comm.all_to_all(x),
            "said": comm.broadcast(x, src=size - 1),
        }

    base = torch.arange(2.0 * size).view(size, 2)
    total = base * size + 100 * sum(range(size))
    found = run_reference(program, {}, size=size, dtype=torch.float32, seed=0, oracle=False)
    for r in range(size):
        assert torch.equal(found[r]["sum"], total)
        assert torch.equal(found[r]["all"], torch.cat([base + 100 * i for i in range(size)]))
        assert torch.equal(found[r]["part"], total[r : r + 1])
        assert torch.equal(found[r]["rows"], torch.stack([base[r] + 100 * i for i in range(size)]))
        assert torch.equal(found[r]["said"], base + 100 * (size - 1))


def test_the_reference_ends_where_a_rank_dies() -> None:
    found = run_reference(collectives.a_rank_dies, {}, size=3, dtype=torch.float32, seed=0, oracle=False)
    assert found.keys() == {0, 1}
    exchange = World(2).exchange(0)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(exchange.all, 0, torch.ones(1))
        exchange.abort()
        with pytest.raises(ConnectionError, match="a rank has died"):
            waiting.result(10)
