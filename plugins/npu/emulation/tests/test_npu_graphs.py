"""Captured steps: lengths are host integers of a captured call, and a replay must be told the new ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch_npu
from sglang_npu.graphs import capture, host_lengths
from sglang_npu_emulation.driver import CaptureError, HostDriver, RecordedGraph
from torch import Tensor

from sglang_core.api import CapturedSteps

KEYS = torch.randn(6, 16, 64, generator=torch.Generator().manual_seed(1)).bfloat16()


@dataclass(kw_only=True)
class Batch:
    q: Tensor  # [2, 4, 32]
    lens_cpu: Tensor  # int32[2]
    table: Tensor  # int32[2, 2]


def batch(first: int, second: int, seed: int = 0) -> Batch:
    q = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(seed)).bfloat16()
    table = torch.tensor([[1, 4], [3, 2]], dtype=torch.int32)
    return Batch(q=q, lens_cpu=torch.tensor([first, second], dtype=torch.int32), table=table)


def attend(state: Any, given: Batch) -> Tensor:
    o = torch_npu.npu_fused_infer_attention_score_v2(
        given.q[:, None],
        KEYS,
        KEYS,
        actual_seq_kvlen=host_lengths("actual_seq_kvlen", given.lens_cpu),
        block_table=given.table,
        block_size=16,
        num_query_heads=4,
        num_key_value_heads=2,
        input_layout="BSND",
    )[0]
    return o[:, 0] * 2


def steps(fn: Any, state: Any, driver: HostDriver, num_buckets: int) -> CapturedSteps:
    return CapturedSteps(fn, state, partial(capture, driver), num_buckets)


def test_replays_attend_over_each_batchs_own_lengths() -> None:
    driver = HostDriver()
    step = steps(attend, None, driver, 1)
    for i, lens in enumerate([(20, 5), (1, 32), (16, 17)]):
        given = batch(*lens, seed=i)
        assert torch.equal(step(given), attend(None, given))
    assert len(driver.graphs) == 1


def test_two_calls_in_one_graph_are_told_theirs() -> None:
    def twice(state: Any, given: tuple[Batch, Batch]) -> Tensor:
        return attend(state, given[0]) + attend(state, given[1])

    step = steps(twice, None, HostDriver(), 1)
    for lens in ((20, 5, 3, 3), (1, 32, 9, 20)):
        given = batch(*lens[:2]), batch(*lens[2:], seed=7)
        assert torch.equal(step(given), twice(None, given))


def test_a_graph_that_is_not_told_keeps_the_lengths_of_its_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the test above can fail: this is what the device does."""
    monkeypatch.setattr(RecordedGraph, "update", lambda self, lengths: None)
    step = steps(attend, None, HostDriver(), 1)
    step(batch(20, 5))
    given = batch(1, 32)
    assert not torch.equal(step(given), attend(None, given))


def test_results_stand_until_after_another_kind_has_run() -> None:
    step = steps(lambda state, x: x * 2, None, HostDriver(), 2)
    first = step(torch.ones(3))
    step(torch.ones(4))
    step(torch.full((4,), 5.0))
    assert first.tolist() == [2, 2, 2]


def test_kinds_beyond_the_limit_run_as_they_are_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    driver = HostDriver()
    step = steps(lambda state, x: x + 1, None, driver, 1)
    for size in range(1, 12):
        assert step(torch.zeros(size)).tolist() == [1.0] * size
    assert len(driver.graphs) == 8 and caplog.text.count("without a graph") == 1


def test_a_value_read_in_a_capture_is_refused() -> None:
    step = steps(lambda state, x: x * x.sum().item(), None, HostDriver(), 1)
    with pytest.raises(CaptureError, match="on the host"):
        step(torch.ones(3))


def test_as_many_updates_as_calls() -> None:
    graph, _ = HostDriver().capture(lambda: attend(None, batch(20, 5)))
    with pytest.raises(CaptureError, match="1 captured calls"):
        graph.update([{"actual_seq_kvlen": [1, 1]}, {"actual_seq_kvlen": [2, 2]}])


def test_the_vendors_graphs_update_the_argument_that_is_noted() -> None:
    from torch_npu.npu._npugraph_handlers.npugraph_handler import _NPU_GRAPH_OP_HANDLERS

    name = torch.ops.npu.npu_fused_infer_attention_score_v2.default.__name__
    updated = _NPU_GRAPH_OP_HANDLERS[name].UPDATE_SPECS
    assert any(argument == "actual_seq_kvlen" for specs in updated.values() for *_, argument in specs)
