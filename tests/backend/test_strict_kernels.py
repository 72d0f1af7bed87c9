"""Mistakes that a vendor's kernel or layer could really have, each with the error that the strict backend gives for it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sglang_core.backend.devices import open_device
from sglang_core.backend.interface import Bucket, RuntimeContext
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.strict_trace import StrictError

T, D, PAGES, PAGE_SIZE = 4, 8, 4, 4
BUCKETS = (Bucket(num_tokens=T, num_reqs=T, max_extend=1, num_pages=2),)
SPEC = PoolSpec(num_layers=2, page_size=PAGE_SIZE, num_kv_heads=1, head_dim=D, v_head_dim=D, dtype=torch.float32)


@dataclass(kw_only=True, slots=True)
class Batch:
    x: Tensor  # [T, D]
    slot_mapping: Tensor  # int32[T]
    positions: Tensor | None = None
    static: Any = None


@dataclass(kw_only=True, slots=True)
class State:
    pool: Pool

    def mutable_tensors(self) -> Iterator[Tensor]:
        yield from self.pool.leaves


def batch(**facts: Any) -> Batch:
    first = {"x": torch.arange(float(T * D)).view(T, D), "slot_mapping": torch.tensor([4, 5, 9, 0], dtype=torch.int32)}
    return Batch(**(first | facts))


@pytest.fixture
def runtime() -> Iterator[Any]:
    chosen = open_device("strict")
    runtime = chosen.backend.create_runtime(RuntimeContext(devices=(chosen.info,)))
    yield runtime
    runtime.close()


@pytest.fixture
def state(runtime: Any) -> State:
    return State(pool=runtime.alloc_pool(SPEC, PAGES))


def row(t: Tensor, index: int) -> np.ndarray:
    """A row of t's memory from its first one on, as a kernel computes its address: nobody asks whether it exists."""
    size = t.shape[-1]
    address = t.data_ptr() + index * size * t.element_size()
    return np.frombuffer((ctypes.c_char * (size * 4)).from_address(address), np.float32)


# Kernels as torch.library has them: a real body, and a fake one for compilers.


@torch.library.custom_op("strict_test::norm", mutates_args=())
def norm(x: Tensor) -> Tensor:
    """It works in x, which saves a buffer, and does not say so."""
    for i in range(len(x)):
        row(x, i)[:] /= 2.0
    return x.clone()


@torch.library.custom_op("strict_test::fill", mutates_args=("out",))
def fill(x: Tensor, out: Tensor, rows: int) -> None:
    """`rows` is that of a tile, which may be more than out has."""
    for i in range(rows):
        row(out, i)[:] = 1.0


@torch.library.custom_op("strict_test::write", mutates_args=("leaf",))
def write(x: Tensor, leaf: Tensor, slots: Tensor, shift: int) -> None:
    """The KV write of a kernel that takes slots at their word."""
    for i, slot in enumerate(slots.tolist()):
        row(leaf, slot + shift)[:] = x[i].numpy()


@torch.library.custom_op("strict_test::no_fake", mutates_args=())
def no_fake(x: Tensor) -> Tensor:
    return x.clone()


@norm.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@fill.register_fake
def _(x: Tensor, out: Tensor, rows: int) -> None:
    return None


@write.register_fake
def _(x: Tensor, leaf: Tensor, slots: Tensor, shift: int) -> None:
    return None


class Layer(nn.Module):
    """One layer; `kernel` is what it calls."""

    def __init__(self, kernel: Callable[..., Tensor]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(D))
        self.kernel, self.calls, self.seen = kernel, 0, []
        self.table = torch.arange(float(D))

    def forward(self, state: State, fb: Batch) -> Tensor:
        return self.kernel(self, state, fb)


class Model(nn.Module):
    def __init__(self, kernel: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(kernel)])

    def step(self, state: State, fb: Batch) -> Tensor:
        return self.layers[0](state, fb)


def honest(layer: Layer, state: State, fb: Batch) -> Tensor:
    out = torch.empty_like(fb.x)
    fill(fb.x, out, T)
    write(fb.x, state.pool.k(0), fb.slot_mapping, 0)
    return out * layer.weight


def works_in_its_argument(layer: Layer, state: State, fb: Batch) -> Tensor:
    h = fb.x * layer.weight
    return norm(h) + h


def writes_a_row_more(layer: Layer, state: State, fb: Batch) -> Tensor:
    out = torch.empty_like(fb.x)
    fill(fb.x, out, T + 1)
    return out


def writes_between_rows(layer: Layer, state: State, fb: Batch) -> Tensor:
    """Its output is every other row of a tensor, and it takes the rows for adjacent ones."""
    out = torch.empty(2 * T, D, device=fb.x.device)
    fill(fb.x, out[::2], T)
    return out[::2]


def writes_one_slot_late(layer: Layer, state: State, fb: Batch) -> Tensor:
    write(fb.x, state.pool.k(0), fb.slot_mapping, 1)
    return fb.x * layer.weight


def writes_past_the_pool(layer: Layer, state: State, fb: Batch) -> Tensor:
    write(fb.x, state.pool.k(0), fb.slot_mapping, PAGES * PAGE_SIZE - 4)
    return fb.x * layer.weight


def scribbles_on_a_weight(layer: Layer, state: State, fb: Batch) -> Tensor:
    if type(fb.x) is Tensor:  # a kernel of C, which no tracer enters
        row(layer.weight, 0)[0] = 3.0
    return fb.x * layer.weight


def counts_its_calls(layer: Layer, state: State, fb: Batch) -> Tensor:
    layer.calls += 1
    return fb.x * layer.calls


def appends_to_a_list(layer: Layer, state: State, fb: Batch) -> Tensor:
    layer.seen.append("a shape")
    return fb.x * layer.weight


@functools.lru_cache
def inverse_frequencies(dim: int, device: torch.device) -> Tensor:
    return 1.0 / 10000 ** (torch.arange(dim, dtype=torch.float32, device=device) / dim)


def caches_a_table(layer: Layer, state: State, fb: Batch) -> Tensor:
    inverse_frequencies.cache_clear()
    return fb.x * inverse_frequencies(D, fb.x.device)


def reads_a_plain_attribute(layer: Layer, state: State, fb: Batch) -> Tensor:
    return fb.x * layer.table


def has_no_fake(layer: Layer, state: State, fb: Batch) -> Tensor:
    return no_fake(fb.x)


def takes_the_address(layer: Layer, state: State, fb: Batch) -> Tensor:
    ctypes.c_float.from_address(fb.x.data_ptr()).value = 1.0
    return fb.x * 1.0


def reads_what_it_writes(layer: Layer, state: State, fb: Batch) -> Tensor:
    """A recurrent state that is read and written in the same slot."""
    old = state.pool.k(0)[fb.slot_mapping // PAGE_SIZE, fb.slot_mapping % PAGE_SIZE][:, 0].nan_to_num()
    new = old + fb.x
    state.pool.scatter(0, fb.slot_mapping, new[:, None], new[:, None])
    return new


def adds_to_what_was_there(layer: Layer, state: State, fb: Batch) -> Tensor:
    """Right on the first day, when fresh memory is zero."""
    return torch.empty_like(fb.x).add_(fb.x)


def asks_a_value(layer: Layer, state: State, fb: Batch) -> Tensor:
    return fb.x[: fb.slot_mapping.max().item()]


CAUGHT = {
    works_in_its_argument: r"strict_test.norm.* changed its argument 'x' .* which its schema does not say",
    writes_a_row_more: r"strict_test.fill.* wrote outside its argument 'out' \(torch.float32 \[4, 8\]",
    writes_between_rows: r"wrote outside its argument 'out' .* strides \[16, 1\]\): honour its strides",
    writes_one_slot_late: r"wrote to slot 6 of pool 'full' \(leaf 0, 2 slots in all\), which no slot_mapping",
    writes_past_the_pool: r"wrote outside its argument 'leaf'|wrote past the end of leaf 0 of pool 'full'",
    scribbles_on_a_weight: r"by a pointer that PyTorch does not see, to Model.layers.0.weight, a torch.float32 tensor \[8\]",
    counts_its_calls: r"sets Model.layers.0.calls; a step keeps nothing",
    appends_to_a_list: r"sets Model.layers.0.seen",
    caches_a_table: r"torch.float32 \[8\], outlives the step that made it \(in a global, a cache or a list\)",
    reads_a_plain_attribute: r"constant that no module registers: Model.layers.0.table, .* self.register_buffer",
    has_no_fake: r"strict_test::no_fake.*register_fake",
    takes_the_address: r"asks for the address of a tensor .*register_fake",
    adds_to_what_was_there: r"differs when the same step runs twice: it reads memory that nobody wrote",
    reads_what_it_writes: r"its result differs when the same step runs twice",
    asks_a_value: r"never reads a value on the host",
}


def run(runtime: Any, state: State, kernel: Callable[..., Tensor], fb: Batch | None = None) -> Tensor:
    return runtime.compile_step(Model(kernel).step, state, BUCKETS)(fb or batch())


def test_honest_kernels_pass(runtime: Any, state: State) -> None:
    assert torch.equal(run(runtime, state, honest), torch.ones(T, D))
    k, _ = state.pool.gather(0, torch.tensor([4, 5, 9], dtype=torch.int32))
    assert torch.equal(k[:, 0], batch().x[:3])


@pytest.mark.parametrize("kernel", CAUGHT, ids=lambda kernel: kernel.__name__)
def test_a_mistake_is_an_error_that_names_it(runtime: Any, state: State, kernel: Callable[..., Tensor]) -> None:
    with pytest.raises(StrictError, match=CAUGHT[kernel]):
        run(runtime, state, kernel)


@pytest.mark.parametrize("kernel", [has_no_fake, takes_the_address, asks_a_value], ids=lambda kernel: kernel.__name__)
def test_an_error_says_which_function_in_which_layer(runtime: Any, state: State, kernel: Callable[..., Tensor]) -> None:
    said = rf"\(in {__name__}.{kernel.__name__} in layer Model.layers.0 \(Layer\) at {__file__}:\d+\)$"
    with pytest.raises(StrictError, match=said):
        run(runtime, state, kernel)


def test_what_a_step_allocates_has_guards(runtime: Any, state: State) -> None:
    """A kernel that is no torch.library op, and writes one row past what it was given."""

    def writes_past(layer: Layer, state: State, fb: Batch) -> Tensor:
        out = torch.empty_like(fb.x)
        if type(fb.x) is Tensor:
            row(out, T)[:] = 1.0
        return out.copy_(fb.x)

    with pytest.raises(
        StrictError, match=r"wrote outside its output: .* made by aten::empty_like \(torch.float32 \[4, 8\]\)"
    ):
        run(runtime, state, writes_past)


def test_a_leaf_that_is_held_across_steps_is_nan(runtime: Any, state: State) -> None:
    """A runtime may rebind the leaves, as one that donates them does; who took them when the model was built has the old ones."""
    held = state.pool.k(0)
    step = runtime.compile_step(Model(honest).step, state, BUCKETS)
    step(batch())
    assert state.pool.k(0) is not held
    assert held.isnan().all()


def test_padding_writes_to_slot_zero(runtime: Any, state: State) -> None:
    with pytest.raises(
        StrictError, match="slot_mapping names slot -1, and the largest pool has slots 0 to 15; padding"
    ):
        run(runtime, state, honest, batch(slot_mapping=torch.tensor([4, 5, -1, -1], dtype=torch.int32)))


def test_indices_are_int32(runtime: Any, state: State) -> None:
    with pytest.raises(
        StrictError, match=r"forward_batch.positions is int64 \[4\]; ids, positions and indices are int32"
    ):
        run(runtime, state, honest, batch(positions=torch.arange(T)))


def test_what_is_no_tensor_joins_the_compile_key(runtime: Any, state: State) -> None:
    with pytest.raises(StrictError, match="forward_batch.static is a ndarray, which cannot be hashed"):
        run(runtime, state, honest, batch(static=np.zeros(2)))
