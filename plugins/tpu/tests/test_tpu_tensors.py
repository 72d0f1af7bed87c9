"""What crosses between the host and JAX, and the operators that this package adds to torchax."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("jax")

from sglang_tpu.environment import array, environment, is_lifted, lift, on_device, to_host, to_jax, to_torch

from sglang_core.api.ops import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool], ids=str)
def test_every_dtype_goes_there_and_back_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).mul(3).to(dtype)
    back = to_torch(to_jax(x))
    assert back.dtype == dtype and back.view(torch.uint8).equal(x.view(torch.uint8))


def test_the_device_has_a_copy() -> None:
    """The engine writes into the same host memory for its next step while the device is at this one."""
    x = torch.zeros(1 << 16)
    there = to_jax(x)
    x.fill_(1)
    back = to_torch(there)
    back.fill_(2)
    assert not to_torch(there).any()


def test_lifted_tensors_work_outside_of_the_environment_and_with_host_tensors() -> None:
    x = lift(torch.arange(6.0).view(2, 3))
    y = x + torch.ones(3)
    assert is_lifted(y) and to_host(y).equal(torch.arange(6.0).view(2, 3) + 1)


@pytest.mark.parametrize("inference", [False, True])
def test_bits_are_no_truth_values(inference: bool) -> None:
    """torchax takes `&` for a logical "and" where it meets it as an operator, which it does in inference mode."""
    bits, other = torch.tensor([6, 5, -1], dtype=torch.int32), torch.tensor([3, 4, 12], dtype=torch.int32)
    with torch.inference_mode(inference), environment():
        a, b = lift(bits), lift(other)
        made = [a & 3, a & b, a | b, a ^ b]
    expected = [bits & 3, bits & other, bits | other, bits ^ other]
    assert all(to_host(x).equal(y) for x, y in zip(made, expected, strict=True))


def test_searchsorted_takes_rows_and_sides() -> None:
    rows = torch.rand(4, 9, generator=torch.Generator().manual_seed(2)).sort(-1).values
    values = torch.cat([rows[:, 2:4], torch.rand(4, 3)], 1)
    for right in (False, True):
        with environment():
            made = torch.searchsorted(lift(rows), lift(values), right=right, out_int32=True)
        assert to_host(made).equal(torch.searchsorted(rows, values, right=right, out_int32=True))


def test_a_kernel_gives_what_it_is_given() -> None:
    norm = on_device(OPS["norm.rms"].body)
    x, w = torch.randn(3, 8), torch.rand(8)
    on_host, on_dev = norm(x, w, 1e-6), norm(lift(x), lift(w), 1e-6)
    assert not is_lifted(on_host) and is_lifted(on_dev)
    torch.testing.assert_close(on_host, OPS["norm.rms"].body(x, w, 1e-6))
    assert to_torch(array(on_dev)).equal(on_host)
