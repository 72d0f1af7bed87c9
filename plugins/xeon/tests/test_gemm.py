from __future__ import annotations

import pytest
import torch
from sglang_xeon import gemm
from tolerance import assert_close

from sglang_core.api.ops import OPS, PackedWeight

DTYPES = [torch.bfloat16, torch.float32, torch.float16]
LINEAR = OPS["gemm.linear"].body


def dense(weight: torch.Tensor) -> PackedWeight:
    return PackedWeight("dense", {"weight": weight}, out_features=weight.shape[0], in_features=weight.shape[1])


# Odd sizes: columns and k that fill no panel, k beyond one block of depth, rows for every tile size and for two row blocks.
SHAPES = [(1, 16, 2), (1, 1, 1), (3, 33, 7), (5, 17, 513), (7, 64, 1024), (32, 200, 65), (97, 48, 1030), (200, 31, 96)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_body(level: str, dtype: torch.dtype, m: int, n: int, k: int, with_bias: bool) -> None:
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    bias = torch.randn(n).to(dtype) if with_bias else None
    # The body in float64: torch's own bfloat16 linear may round twice.
    want = LINEAR(x.double(), dense(w.double()), None if bias is None else bias.double()).to(dtype)
    assert_close(gemm.linear(x, gemm.pack(dense(w)), bias), want, scale=k**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_count_gives_the_same_rows(level: str, dtype: torch.dtype) -> None:
    x, w = torch.randn(130, 1100).to(dtype), gemm.pack(dense(torch.randn(200, 1100).to(dtype)))
    whole = gemm.linear(x, w)
    for m in (1, 2, 3, 5, 6, 7, 12, 13, 31, 96, 97):
        assert torch.equal(gemm.linear(x[:m], w), whole[:m]), f"{m} rows differ from {len(x)}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(level: str, dtype: torch.dtype) -> None:
    x, w = torch.randn(9, 300).to(dtype), gemm.pack(dense(torch.randn(500, 300).to(dtype)))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(gemm.linear(x, w))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_mixed_dtypes(level: str) -> None:
    """float32 activations on bfloat16 weights, as a head in float32 would have it."""
    x, w = torch.randn(4, 64), torch.randn(20, 64).bfloat16()
    assert_close(gemm.linear(x, gemm.pack(dense(w))), x @ w.float().T, scale=8)


def test_leading_dims_strides_and_empty_batches(level: str) -> None:
    w = gemm.pack(dense(torch.randn(24, 32)))
    x = torch.randn(2, 3, 64)[..., ::2]
    got = gemm.linear(x, w)
    assert got.shape == (2, 3, 24)
    assert torch.equal(got.view(6, 24), gemm.linear(x.contiguous().view(6, 32), w))
    column = torch.randn(5, 64)[:, 32:]
    assert torch.equal(gemm.linear(column, w), gemm.linear(column.contiguous(), w))
    assert gemm.linear(torch.randn(0, 32), w).shape == (0, 24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(16, 2), (1, 1), (33, 7), (100, 65)])
def test_unpack_inverts_pack(level: str, dtype: torch.dtype, n: int, k: int) -> None:
    w = torch.randn(n, k).to(dtype)
    packed = gemm.pack(dense(w))
    assert packed.layout == gemm.LAYOUT
    assert torch.equal(gemm.unpack(packed)["weight"], w)


def test_pack_rewrites_in_place() -> None:
    first, second = torch.randn(20, 12), torch.randn(20, 12)
    packed = gemm.pack(dense(first))
    address = packed["packed"].data_ptr()
    assert gemm.pack(dense(second), packed) is packed
    assert packed["packed"].data_ptr() == address
    assert torch.equal(gemm.unpack(packed)["weight"], second)


def test_a_nan_stays_in_its_row(level: str) -> None:
    x, w = torch.randn(7, 64).bfloat16(), gemm.pack(dense(torch.randn(32, 64).bfloat16()))
    x[3, 5] = float("nan")
    rows = gemm.linear(x, w).isnan()
    assert rows[3].all()
    assert not rows[:3].any()
    assert not rows[4:].any()


@pytest.mark.parametrize("m", [3, 20, 70])
def test_amx_variant_is_the_body(m: int) -> None:
    """Tiles where there are any (emulated, or real), else what `linear` runs."""
    x, w, bias = torch.randn(m, 64).bfloat16(), torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16()
    want = (x.double() @ w.double().T + bias.double()).bfloat16()
    # torch's bfloat16 linear rounds the product before it adds the bias on some CPUs: one more unit of 2^-8.
    torch.testing.assert_close(gemm.linear_amx(x, gemm.pack(dense(w)), bias), want, rtol=2**-6, atol=2**-4)


def test_wrong_sizes_are_refused(level: str) -> None:
    w = gemm.pack(dense(torch.randn(24, 32)))
    with pytest.raises(RuntimeError, match=r"linear takes \[m, 32\]"):
        gemm.linear(torch.randn(2, 31), w)
    with pytest.raises(RuntimeError, match="bias must have 24 elements"):
        gemm.linear(torch.randn(2, 32), w, torch.randn(23))
