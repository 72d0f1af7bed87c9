"""Several arrays by one transfer, and results that are copied while the device goes on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sglang_core.api import CapturedRuntime, DeviceDriver, one_transfer
from sglang_core.backend.transfers import to_pinned
from sglang_core.runner.sampler import SampleOutput
from tests.backend.fake_driver import FakeDriver, FakeDriverError
from tests.backend.test_captured_runtime import runtime

HOST = torch.device("cpu")


def pinned(num_bytes: int) -> Tensor:
    """As a device's driver: undefined."""
    return torch.full((num_bytes,), 0xAB, dtype=torch.uint8)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.sampled_from(["i4", "f4"])), max_size=6)
)
def test_every_array_arrives(kinds: list[tuple[list[int], str]]) -> None:
    """Whatever their shapes, empty ones among them; each begins where kernels expect it."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-(2**30), 2**30, shape).astype(dtype) for shape, dtype in kinds]
    placed = one_transfer(arrays, HOST, pinned)
    assert len(placed) == len(arrays)
    for x, t in zip(arrays, placed, strict=True):
        assert torch.equal(t, torch.from_numpy(x)) and t.dtype == torch.from_numpy(x).dtype
        assert t.is_contiguous() and (t.data_ptr() - placed[0].data_ptr()) % 16 == 0


def test_arrays_may_have_any_strides() -> None:
    table = np.arange(24, dtype=np.int32).reshape(4, 6)
    columns, turned = one_transfer([table[:, :3], table.T], HOST, pinned)
    assert columns.tolist() == table[:, :3].tolist() and turned.tolist() == table.T.tolist()


def test_it_is_one_transfer() -> None:
    """Into one allocation, from one of the driver's."""
    asked: list[int] = []

    def counted(num_bytes: int) -> Tensor:
        asked.append(num_bytes)
        return pinned(num_bytes)

    a, b = one_transfer([np.zeros(3, np.int32), np.zeros((2, 2), np.float32)], HOST, counted)
    assert asked == [32] and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize("x", [torch.arange(6).view(2, 3), torch.zeros(0, 4), torch.tensor(1.5, dtype=torch.bfloat16)])
def test_results_are_copied(x: Tensor) -> None:
    copy = to_pinned(x, pinned)
    assert torch.equal(copy, x) and copy.dtype == x.dtype and (copy.data_ptr() != x.data_ptr() or not x.numel())


def test_results_of_a_step_are_copied_on_its_stream() -> None:
    """Who waited for the step's event may read them; who did not, may not. What is absent stays absent."""
    driver = FakeDriver(watch=True)
    opened: CapturedRuntime[DeviceDriver] = runtime(driver)
    stream = opened.stream()

    def step() -> SampleOutput:
        out = SampleOutput(ids=torch.arange(3), logprobs=None, top_logprobs=None, top_ids=None)
        made: SampleOutput = opened.to_host(out)
        assert made.ids.data_ptr() != out.ids.data_ptr()
        return made

    work = stream.submit(step)
    with driver.watching():
        output, _ = work._launched.result()
        with pytest.raises(FakeDriverError, match="no event"):
            output.ids + 1
        assert (work.result().ids + 1).tolist() == [1, 2, 3] and output.logprobs is None
    stream.close()
