"""Steps that are recorded and replayed: the same results, and no replay where it could not give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from sglang_xeon import gemm, norm, step_graph
from sglang_xeon.attention_plan import COLUMNS, plan
from sglang_xeon.backend import XeonBackend
from sglang_xeon.runtime import XeonRuntime
from sglang_xeon.step_graph import RECORD_AT, StepGraphs
from torch import Tensor

from sglang_core.api import RuntimeContext
from sglang_core.api.ops import AttnBatch, AttnSpec, PackedWeight

WIDTH, LAYERS = 64, 12


@dataclass(kw_only=True, slots=True)
class Batch:
    x: Tensor  # [T, WIDTH]
    rows: Tensor  # int64[S]
    scale: float = 1.0


class Network:
    """`LAYERS` of a product and a norm with a residual, some torch ops among them, and a tensor that steps write."""

    def __init__(self, extra: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
        self.weight = gemm.pack(PackedWeight("dense", {"weight": weight}, out_features=WIDTH, in_features=WIDTH))
        self.norm_weight = torch.rand(WIDTH, generator=generator)
        self.extra, self.calls = extra, 0
        self.written = torch.zeros(WIDTH)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.calls += 1
        with torch.inference_mode():
            h, residual = batch.x, batch.x * batch.scale
            for _ in range(LAYERS):
                h, residual = norm.add_rms_norm(gemm.linear(h, self.weight), residual, self.norm_weight, 1e-6)
            h = self.extra(h)
            h, residual = norm.add_rms_norm(h, residual, self.norm_weight, 1e-6)
            self.written.copy_(residual[0])
            return h, gemm.linear(h[batch.rows], self.weight).double()


def batch_of(num_tokens: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, num_tokens, (2,), generator=generator)
    return Batch(x=torch.randn(num_tokens, WIDTH, generator=generator), rows=rows)


def torch_ops(x: Tensor) -> Tensor:
    return (x.sigmoid() * 2).view(-1, 2, WIDTH // 2).transpose(0, 1).contiguous().view(-1, WIDTH)


@pytest.mark.parametrize("extra", [lambda x: x, torch_ops], ids=["kernels", "torch_ops"])
def test_replays_give_what_steps_give(extra: Callable[[Tensor], Tensor]) -> None:
    network, plain = Network(extra), Network(extra)
    graphs = StepGraphs(network)
    standing: list[tuple[Tensor, Tensor]] = []  # of this call and the one before it: those must not be overwritten
    for seed in range(RECORD_AT + 6):
        for num_tokens in (1, 5):
            result, expected = graphs(batch_of(num_tokens, seed)), plain(batch_of(num_tokens, seed))
            assert torch.equal(network.written, plain.written)
            standing = [*standing[-len(result) :], *zip(result, expected, strict=True)]
            assert all(torch.equal(a, b) for a, b in standing)
    assert network.calls == 2 * (RECORD_AT + 1)  # and then replays only


IN_THE_MIDDLE: list[Callable[[], None]] = []  # what happens while a step is replayed


@torch.library.custom_op("test_step_graph::meanwhile", mutates_args=())
def meanwhile(x: Tensor) -> Tensor:
    for happens in IN_THE_MIDDLE:
        happens()
    return x.clone()


def test_two_step_functions_may_run_at_once() -> None:
    """As two engines in one process: what one writes, the other does not."""
    first, second, plain = StepGraphs(Network(meanwhile)), StepGraphs(Network()), Network()
    for seed in range(RECORD_AT + 2):
        first(batch_of(4, seed)), second(batch_of(4, seed))
    IN_THE_MIDDLE.append(lambda: second(batch_of(4, 99)))
    try:
        got = first(batch_of(4, 7))
    finally:
        IN_THE_MIDDLE.clear()
    expected = plain(batch_of(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_rewritten_weight_is_recorded_anew() -> None:
    network = Network()
    graphs = StepGraphs(network)
    for seed in range(RECORD_AT + 2):
        graphs(batch_of(3, seed))
    calls = network.calls
    other = PackedWeight("dense", {"weight": torch.eye(WIDTH)}, out_features=WIDTH, in_features=WIDTH)
    gemm.pack(other, network.weight)
    for seed in range(RECORD_AT + 2):
        assert all(
            torch.equal(a, b) for a, b in zip(graphs(batch_of(3, seed)), network(batch_of(3, seed)), strict=True)
        )
    assert network.calls == calls + RECORD_AT + 1 + RECORD_AT + 2


@pytest.mark.parametrize("num_tokens", [3, 200], ids=["replayed", "long"])
def test_who_waits_is_told_before_the_kernels_of_every_step(num_tokens: int) -> None:
    told: list[int] = []
    network = Network()
    graphs = StepGraphs(network, lambda: told.append(network.calls))
    for seed in range(RECORD_AT + 4):
        graphs(batch_of(num_tokens, seed))
    own_steps = min(RECORD_AT + 4, RECORD_AT + 1) if num_tokens == 3 else RECORD_AT + 4
    assert told == [min(i, own_steps) for i in range(RECORD_AT + 4)]  # once a step, and before it


def test_a_batch_is_not_changed() -> None:
    graphs = StepGraphs(Network())
    for seed in range(RECORD_AT + 3):
        batch = batch_of(3, seed)
        x = batch.x.clone()
        graphs(batch)
        assert torch.equal(batch.x, x)


def read_back(x: Tensor) -> Tensor:
    return x * float(x.sum().item() > 0)


def transposed_operand(x: Tensor) -> Tensor:
    return norm.layer_norm(x.t().contiguous().t(), torch.ones(WIDTH), None, 1e-6)


def changing() -> Callable[[Tensor], Tensor]:
    calls = iter(range(1000))
    return lambda x: x * next(calls)


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        (read_back, "the host reads a tensor"),
        (transposed_operand, "an operand was copied"),
        (changing(), "its replay differs"),
    ],
    ids=["read_back", "operand_copied", "changing"],
)
def test_steps_that_a_replay_would_not_repeat_are_left_alone(
    extra: Callable[[Tensor], Tensor], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    network = Network(extra)
    graphs = StepGraphs(network)
    with caplog.at_level("INFO", step_graph.__name__):
        for seed in range(8):
            graphs(batch_of(4, seed))
    assert network.calls == 8
    assert why in caplog.text


def test_long_steps_and_rare_shapes_are_left_alone() -> None:
    network = Network()
    graphs = StepGraphs(network)
    for seed in range(6):
        graphs(batch_of(step_graph.MAX_ROWS + 2, seed))
    assert network.calls == 6
    for seed in range(2 * step_graph.MAX_SHAPES):  # each shape comes again after all others, and is forgotten by then
        batch = batch_of(2, seed)
        batch.scale = 1.0 + seed % (step_graph.MAX_SHAPES + 1)
        graphs(batch)
    assert network.calls == 6 + 2 * step_graph.MAX_SHAPES


def test_steps_of_few_kernels_are_left_alone() -> None:
    calls = []

    def step(x: Tensor) -> Tensor:
        calls.append(x)
        return norm.rms_norm(x, torch.ones(WIDTH), 1e-6)

    graphs = StepGraphs(step)
    for _ in range(10):
        graphs(torch.ones(2, WIDTH))
    assert len(calls) == 10


@pytest.mark.parametrize(("facts", "replayed"), [({}, True), ({"watched": True}, False)])
def test_ops_that_are_watched_run_every_step(facts: dict[str, bool], replayed: bool) -> None:
    threads = torch.get_num_threads()
    network = Network()
    try:
        runtime = XeonRuntime(RuntimeContext(devices=tuple(XeonBackend().probe()), num_threads=threads, **facts))
        step = runtime.compile_step(lambda state, batch: network(batch), None, ())
        for seed in range(10):
            step(batch_of(2, seed))
    finally:
        torch.set_num_threads(threads)
    assert (network.calls < 10) is replayed


def test_a_page_more_is_no_new_shape_of_plan() -> None:
    spec = AttnSpec(num_heads=2, num_kv_heads=1, head_dim=8, v_head_dim=8, scale=1.0)
    made = []
    for num_pages in (1, 2, COLUMNS, COLUMNS + 1):
        batch = AttnBatch(
            cu_extend_cpu=torch.tensor([0, 1], dtype=torch.int32),
            prefix_lens_cpu=torch.tensor([num_pages * 4 - 1], dtype=torch.int32),
            seq_lens_cpu=torch.tensor([num_pages * 4], dtype=torch.int32),
            page_table_cpu=torch.arange(1, num_pages + 1, dtype=torch.int32)[None],
            slot_mapping_cpu=torch.zeros(1, dtype=torch.int32),
            num_tokens=1,
            num_reqs=1,
            max_extend=1,
            num_pages=num_pages,
            page_size=4,
        )
        made.append(plan(spec, batch, torch.device("cpu")))
        assert made[-1].page_table[0, :num_pages].tolist() == list(range(1, num_pages + 1))
    assert [p.page_table.shape[1] for p in made] == [COLUMNS, COLUMNS, COLUMNS, 2 * COLUMNS]
    assert made[0].static == made[2].static != made[3].static
