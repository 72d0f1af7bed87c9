"""Each rule of the strict backend, with a step that breaks it, and one that keeps them all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sglang_core.backend.devices import open_device
from sglang_core.backend.interface import Bucket, DefaultsContext, RuntimeContext
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.strict_trace import StrictError, trace_step
from sglang_core.config import EngineConfig

DEVICE = torch.device("cpu")
BUCKETS = (Bucket(num_tokens=4, num_reqs=4, max_extend=1, num_pages=2),)
SPEC = PoolSpec(num_layers=2, page_size=4, num_kv_heads=1, head_dim=8, v_head_dim=8, dtype=torch.float32)


@dataclass(kw_only=True, slots=True)
class Batch:
    ids: Tensor
    slots: Tensor
    plans: dict[str, Any] = field(default_factory=dict)
    longest: int = 1
    pools: Any = None
    num_tokens: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.num_tokens = len(self.ids)


@dataclass(kw_only=True, slots=True)
class State:
    pool: Pool
    next_token_ids: Tensor

    def mutable_tensors(self) -> Iterator[Tensor]:
        yield from self.pool.leaves
        yield self.next_token_ids


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(16, 8))
        self.proj = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(8))
        self.last: Tensor | None = None

    def forward(self, ids: Tensor) -> Tensor:
        return self.proj(self.embed[ids]) * self.scale


@pytest.fixture
def runtime():
    chosen = open_device("strict")
    runtime = chosen.backend.create_runtime(RuntimeContext(devices=(chosen.info,)))
    yield runtime
    runtime.close()


@pytest.fixture
def state(runtime) -> State:
    return State(pool=runtime.alloc_pool(SPEC, 3), next_token_ids=torch.zeros(5, dtype=torch.int32))


def batch(t: int = 4, **kwargs: Any) -> Batch:
    return Batch(ids=torch.arange(t, dtype=torch.int32), slots=torch.arange(4, 4 + t, dtype=torch.int32), **kwargs)


def good_step(model: Model) -> Callable[[State, Batch], Tensor]:
    def step(state: State, fb: Batch) -> Tensor:
        fb.pools = state.pool  # the runner does so; it must not reach the caller's batch as a fake
        h = model(fb.ids).to(model.scale.device)
        h = h + torch.zeros(8, device=DEVICE)  # a device that was asked for when the model was built
        state.pool.scatter(0, fb.slots, h[:, None], h[:, None])
        k, _ = fb.pools.gather(0, fb.slots)
        seen = torch.arange(h.shape[0], device=h.device)[:, None] >= 0
        out = torch.where(seen, k[:, 0], 0.0) + h
        state.next_token_ids.index_put_((fb.ids,), out.argmax(-1).to(torch.int32))
        return out

    return step


def test_a_step_that_keeps_the_rules_runs_and_gives_eager_results(runtime, state: State) -> None:
    model = Model()
    step = runtime.compile_step(good_step(model), state, BUCKETS)
    fb = batch()
    out = step(fb)
    torch.testing.assert_close(out, 2 * model(fb.ids))
    assert state.next_token_ids[:4].tolist() == out.argmax(-1).tolist()
    assert torch.equal(step(fb), out)


def host_value(state, fb, model):
    return model(fb.ids) * fb.ids.sum().item()


def to_list(state, fb, model):
    return fb.ids.tolist()


def if_tensor(state, fb, model):
    h = model(fb.ids)
    return h if h.sum() > 0 else -h


def int_of_tensor(state, fb, model):
    return model(fb.ids)[: int(fb.ids[0])]


def boolean_mask(state, fb, model):
    h = model(fb.ids)
    return h[fb.ids > 1]


def boolean_mask_write(state, fb, model):
    h = model(fb.ids)
    h[fb.ids > 1] = 0.0
    return h


def nonzero(state, fb, model):
    return fb.ids.nonzero()


def repeat_by_value(state, fb, model):
    return torch.repeat_interleave(model(fb.ids), fb.ids, dim=0)


def no_device(state, fb, model):
    return model(fb.ids) + torch.arange(8)


def no_device_alone(state, fb, model):
    return torch.zeros(4)


def host_constant(state, fb, model):
    return model(fb.ids) + torch.tensor([1.0] * 8, device=fb.ids.device)


def copy_to_host(state, fb, model):
    return model(fb.ids).cpu()


def copy_to_host_by_name(state, fb, model):
    return model(fb.ids).to("cpu")


def stateful_rng(state, fb, model):
    return model(fb.ids) + torch.rand(8, device=fb.ids.device)


def multinomial(state, fb, model):
    return torch.multinomial(model(fb.ids).softmax(-1), 1)


def writes_a_weight(state, fb, model):
    model.scale.mul_(2.0)
    return model(fb.ids)


def writes_a_view_of_a_weight(state, fb, model):
    model.embed.data[0].zero_()
    return model(fb.ids)


def writes_its_input(state, fb, model):
    h = model(fb.ids)
    fb.ids.add_(1)
    return h


def writes_with_out(state, fb, model):
    return torch.add(model(fb.ids), 1.0, out=fb.plans["buffer"])


def writes_a_view_of_the_pool(state, fb, model):
    h = model(fb.ids)
    state.pool.k(0).view(-1, 1, 8).index_put_((fb.slots,), h[:, None])
    return h


def assigns_to_the_pool(state, fb, model):
    state.pool.k(0)[1] = 0.0
    return model(fb.ids)


def keeps_activations(state, fb, model):
    model.last = model(fb.ids)
    return model.last


def rebinds_state(state, fb, model):
    state.next_token_ids = model(fb.ids).argmax(-1)
    return state.next_token_ids


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        (host_value, "never reads a value on the host"),
        (to_list, "never reads a value on the host"),
        (if_tensor, "never reads a value on the host"),
        (int_of_tensor, "never reads a value on the host"),
        (boolean_mask, "boolean mask"),
        (boolean_mask_write, "boolean mask"),
        (nonzero, "size depends on values"),
        (repeat_by_value, "size depends on values"),
        (no_device, "without device="),
        (no_device_alone, "without device="),
        (host_constant, "host constant"),
        (copy_to_host, "never reads a value on the host"),
        (copy_to_host_by_name, "waits for the device"),
        (stateful_rng, "stateful generator"),
        (multinomial, "stateful generator"),
        (writes_a_weight, "does not declare"),
        (writes_a_view_of_a_weight, "does not declare"),
        (writes_its_input, r"forward_batch.ids \(torch.int32 \[4\]\), which `state` does not declare"),
        (writes_with_out, r"forward_batch.plans\[0\]"),
        (writes_a_view_of_the_pool, "through a view"),
        (assigns_to_the_pool, "through a view"),
        (keeps_activations, "sets Model.last"),
        (rebinds_state, "rebinds a tensor of its state"),
    ],
)
def test_a_step_that_breaks_a_rule_fails_at_its_line(runtime, state: State, bad, rule: str) -> None:
    model = Model()
    step = runtime.compile_step(lambda state, fb: bad(state, fb, model), state, BUCKETS)
    with pytest.raises(StrictError, match=rule) as e:
        step(batch(plans={"buffer": torch.empty(4, 8)}))
    if "sets" not in rule and "rebinds" not in rule:
        line = str(e.value).rsplit(":", 1)[1].rstrip(")")
        first = bad.__code__.co_firstlineno
        assert __file__ in str(e.value)
        assert first < int(line) <= first + 6


def test_a_write_that_tracing_cannot_see_is_caught_by_its_version(runtime, state: State) -> None:
    model = Model()

    def step(state: State, fb: Batch) -> Tensor:
        out = fb.ids + model.scale[:4]
        if type(fb.ids) is Tensor:  # like a kernel whose fake body does less than the real one
            model.scale.add_(1.0)
        return out

    with pytest.raises(StrictError, match="does not declare"):
        runtime.compile_step(step, state, BUCKETS)(batch())


def test_rows_that_are_no_buckets_are_refused_at_once(runtime, state: State) -> None:
    step = runtime.compile_step(good_step(Model()), state, BUCKETS)
    with pytest.raises(
        StrictError, match=r"forward_batch.ids has 3 rows, and the buckets have .* of 4; pad to a bucket"
    ):
        step(batch(3))


def test_shapes_that_vary_run_out_of_buckets(runtime, state: State) -> None:
    """Like a page table with as many columns as the longest req of this step needs."""
    step = runtime.compile_step(good_step(Model()), state, BUCKETS)
    for columns in range(1, 9):
        step(batch(plans={"page_table": torch.zeros(4, columns, dtype=torch.int32)}))
    with pytest.raises(StrictError, match=r"pad to a bucket.*forward_batch\.plans\[0\] took 9"):
        step(batch(plans={"page_table": torch.zeros(4, 9, dtype=torch.int32)}))


def test_a_host_value_that_varies_runs_out_of_buckets(runtime, state: State) -> None:
    step = runtime.compile_step(good_step(Model()), state, BUCKETS)
    for longest in range(8):
        step(batch(longest=longest))
    with pytest.raises(StrictError, match=r"forward_batch.longest took 9"):
        step(batch(longest=8))


def test_padding_to_the_bucket_holds(runtime, state: State) -> None:
    step = runtime.compile_step(good_step(Model()), state, BUCKETS)
    for t in range(1, 5):
        padded = batch(4)
        step(replace(padded, slots=torch.where(torch.arange(4) < t, padded.slots, 0)))


def test_pools_hold_nan_until_written_and_again_once_freed(runtime) -> None:
    pool = runtime.alloc_pool(SPEC, 3)
    assert all(leaf.isnan().all() for leaf in pool.leaves)
    slots = torch.arange(4, 8, dtype=torch.int32)
    pool.scatter(0, slots, torch.ones(4, 1, 8), torch.ones(4, 1, 8))
    assert not pool.gather(0, slots)[0].isnan().any()
    pool.poison([1])
    assert pool.gather(0, slots)[0].isnan().all()
    assert runtime.poisons_freed_pages


def test_buckets_cover_decode_and_prefill_up_to_the_limits(runtime) -> None:
    buckets = runtime.buckets(max_num_tokens=100, max_num_reqs=6, max_num_pages=9)
    assert [(b.num_tokens, b.num_reqs) for b in buckets if b.max_extend == 1] == [(1, 1), (4, 4), (6, 6)]
    assert max(b.num_tokens for b in buckets) == 100
    assert {b.num_pages for b in buckets} == {9}
    assert len(buckets) < 10


def test_it_asks_for_settings_that_keep_its_buckets_small() -> None:
    chosen = open_device("strict")
    defaults = chosen.backend.config_defaults(DefaultsContext(device=chosen.info, model={}))
    settled = EngineConfig.from_flat(**defaults)
    assert settled.schedule.max_running_requests == 8
    assert settled.schedule.chunked_prefill_size == 64


def test_steps_are_traced_on_threads_that_come_and_go() -> None:
    """PyTorch 2.11 built for CUDA, with no GPU, has crashed at the second of them."""
    traced = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: traced.append(trace_step(lambda _, x: x + 1, None, torch.ones(2), ())))
        thread.start()
        thread.join()
    assert len(traced) == 3
