from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sglang_xeon import moe
from tolerance import assert_close

from sglang_core.api.ops import OPS, ExpertSpec, PackedWeight

DTYPES = [torch.bfloat16, torch.float32]
FUSED, GROUPED = OPS["moe.fused"].body, OPS["gemm.grouped"].body
CLAMPED = ExpertSpec(activation="swiglu_clamped")


def stack(*shape: int, dtype: torch.dtype) -> PackedWeight:
    x, n, k = shape
    weight = (torch.randn(shape) * k**-0.5).to(dtype)
    return PackedWeight("dense", {"weight": weight}, out_features=n, in_features=k, num_experts=x)


def wide(w: PackedWeight) -> PackedWeight:
    weight = w["weight"].double()
    return PackedWeight(
        "dense", {"weight": weight}, out_features=w.out_features, in_features=w.in_features, num_experts=w.num_experts
    )


def distinct(tokens: int, experts: int, k: int) -> torch.Tensor:
    """int32[T, K], each row without repeats."""
    return torch.rand(tokens, experts).argsort(dim=1)[:, :k].int()


# Odd sizes: widths that fill no panel, so that gate and up share one; one expert for all; more rows than a block.
SHAPES = [(1, 8, 2, 64, 48), (7, 16, 4, 67, 33), (40, 4, 2, 128, 96), (33, 3, 1, 34, 1), (250, 2, 2, 48, 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, experts, k, hidden, width", SHAPES)
@pytest.mark.parametrize("act", [ExpertSpec(), CLAMPED, ExpertSpec(activation="gelu", weight_on_input=True)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fused_is_the_body(
    level: str,
    dtype: torch.dtype,
    tokens: int,
    experts: int,
    k: int,
    hidden: int,
    width: int,
    act: ExpertSpec,
    with_bias: bool,
) -> None:
    x, w13 = torch.randn(tokens, hidden).to(dtype), stack(experts, 2 * width, hidden, dtype=dtype)
    w2 = stack(experts, hidden, width, dtype=dtype)
    weights, ids = torch.rand(tokens, k), distinct(tokens, experts, k)
    given = {}
    if with_bias:
        given = {"bias13": torch.randn(experts, 2 * width).to(dtype), "bias2": torch.randn(experts, hidden).to(dtype)}
    got = moe.fused(x, moe.pack(w13), moe.pack(w2), weights, ids, act, **given)
    exact = {name: bias.double() for name, bias in given.items()}
    want = FUSED(x.double(), wide(w13), wide(w2), weights.double(), ids, act, **exact).to(dtype)
    # Gate, up, their product and each expert's result are rounded on the way, as the body rounds them.
    assert_close(got, want, scale=4 if dtype == torch.float32 else 40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_of_other_ranks_add_nothing(level: str, dtype: torch.dtype) -> None:
    w13, w2 = stack(3, 64, 32, dtype=dtype), stack(3, 32, 32, dtype=dtype)
    x, weights, ids = torch.randn(9, 32).to(dtype), torch.rand(9, 4), distinct(9, 6, 4)
    expert_map = torch.tensor([2, -1, 0, -1, 1, -1], dtype=torch.int32)
    got = moe.fused(x, moe.pack(w13), moe.pack(w2), weights, ids, ExpertSpec(), expert_map=expert_map)
    want = FUSED(x, w13, w2, weights, ids, ExpertSpec(), expert_map=expert_map)
    assert_close(got, want, scale=8)
    nobody = torch.full((6,), -1, dtype=torch.int32)
    assert not moe.fused(x, moe.pack(w13), moe.pack(w2), weights, ids, ExpertSpec(), expert_map=nobody).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokens_result_is_its_own(level: str, dtype: torch.dtype) -> None:
    w13, w2 = (moe.pack(stack(5, *shape, dtype=dtype)) for shape in ((96, 70), (70, 48)))
    x, weights, ids = torch.randn(230, 70).to(dtype), torch.rand(230, 2), distinct(230, 5, 2)
    whole = moe.fused(x, w13, w2, weights, ids, ExpertSpec())
    for start, stop in ((0, 1), (3, 5), (100, 113), (60, 230)):
        part = moe.fused(x[start:stop], w13, w2, weights[start:stop], ids[start:stop], ExpertSpec())
        assert torch.equal(part, whole[start:stop])


def test_threads_do_not_change_a_bit(level: str) -> None:
    w13, w2 = (moe.pack(stack(6, *shape, dtype=torch.bfloat16)) for shape in ((160, 64), (64, 80)))
    x, weights, ids = torch.randn(50, 64).bfloat16(), torch.rand(50, 3), distinct(50, 6, 3)
    results = with_threads((1, 2, 3), lambda: moe.fused(x, w13, w2, weights, ids, ExpertSpec()))
    assert all(torch.equal(r, results[0]) for r in results)


def with_threads(counts: tuple[int, ...], run: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    before, results = torch.get_num_threads(), []
    try:
        for n in counts:
            torch.set_num_threads(n)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


def test_a_nan_stays_with_its_token(level: str) -> None:
    w13, w2 = (moe.pack(stack(2, *shape, dtype=torch.bfloat16)) for shape in ((64, 32), (32, 32)))
    x, ids = torch.randn(5, 32).bfloat16(), torch.zeros(5, 1, dtype=torch.int32)
    x[2, 7] = float("nan")
    for act in (ExpertSpec(), CLAMPED):
        rows = moe.fused(x, w13, w2, torch.ones(5, 1), ids, act).isnan()
        assert rows[2].all()
        assert not rows[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes, past", [((1, 0, 2), 0), ((0, 130, 7), 5), ((0, 0, 0), 3), ((4,), 0)])
@pytest.mark.parametrize("n, k", [(96, 128), (33, 67)])
def test_grouped_is_the_body(level: str, dtype: torch.dtype, sizes: tuple[int, ...], past: int, n: int, k: int) -> None:
    w, group_sizes = stack(len(sizes), n, k, dtype=dtype), torch.tensor(sizes, dtype=torch.int32)
    x, bias = torch.randn(sum(sizes) + past, k).to(dtype), torch.randn(len(sizes), n).to(dtype)
    want = GROUPED(x.double(), wide(w), group_sizes, bias.double()).to(dtype)
    assert_close(moe.grouped(x, moe.pack(w), group_sizes, bias), want, scale=4)


# Each kind of code and scale, and of activations; static ones bring a scale an expert.
FORMATS = (
    *("fp8.tensor.static", "fp8.token_channel", "fp8.block128", "int8.token_channel", "int8.token_channel.asym"),
    *("int4.awq.g32", "int4.pack.g-1", "w4a8_fp8.g64", "mxfp4.g32", "nvfp4.g16", "nvfp4.g16.static", "nvfp4.g16.a16"),
)


def quantized(fmt: str, *shape: int) -> PackedWeight:
    x_scale = torch.rand(shape[0], 1) * 0.01 + 0.01 if fmt.endswith(".static") else None
    weight = torch.randn(shape) * shape[-1] ** -0.5
    return OPS["quant.quantize"].body(weight, fmt, x_scale=x_scale)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("tokens", [1, 60])
def test_fused_in_every_format_is_the_body(level: str, fmt: str, tokens: int) -> None:
    """In float32: rounded to bfloat16, what is quantised on the way may fall on the next code."""
    w13, w2 = quantized(fmt, 5, 192, 128), quantized(fmt, 5, 128, 96)
    x, weights, ids = torch.randn(tokens, 128), torch.rand(tokens, 3), distinct(tokens, 5, 3)
    want = FUSED(x, w13, w2, weights, ids, ExpertSpec())
    got = moe.fused(x, moe.pack(w13), moe.pack(w2), weights, ids, ExpertSpec())
    off = (got - want).abs().max(dim=1).values / want.abs().amax(1)
    # Both sum in float32 in different orders, so that now and then an activation is a code off: 2^-4 of one of 96 terms.
    assert float(off.median()) < 1e-5
    assert float(off.max()) < 2e-2


@pytest.mark.parametrize("fmt", FORMATS)
def test_grouped_in_every_format_is_the_body(level: str, fmt: str) -> None:
    w, sizes = quantized(fmt, 3, 48, 128), torch.tensor([2, 0, 110], dtype=torch.int32)
    for dtype in DTYPES:
        x, bias = torch.randn(115, 128).to(dtype), torch.randn(3, 48).to(dtype)
        assert_close(moe.grouped(x, moe.pack(w), sizes, bias), GROUPED(x, w, sizes, bias), scale=4)


@pytest.mark.parametrize("fmt", ["dense", "int8.token_channel", "int4.awq.g32"])
def test_tiles_give_the_body(level: str, fmt: str) -> None:
    """At the level amx, experts with 16 rows and more run on tiles; at others nothing changes, to the bit."""
    w13, w2 = quantized(fmt, 3, 96, 64), quantized(fmt, 3, 64, 48)
    x, weights, ids = torch.randn(70, 64).bfloat16(), torch.rand(70, 2), distinct(70, 3, 2)
    if fmt == "dense":
        w13, w2 = (stack(3, *shape, dtype=torch.bfloat16) for shape in ((96, 64), (64, 48)))
    packed = moe.pack(w13), moe.pack(w2)
    plain, got = (f(x, *packed, weights, ids, ExpertSpec()) for f in (moe.fused, moe.fused_amx))
    assert_close(got, plain, scale=40)
    assert level == "amx" or torch.equal(got, plain)
    sizes = torch.tensor([40, 3, 20], dtype=torch.int32)
    assert_close(moe.grouped_amx(x, packed[0], sizes), moe.grouped(x, packed[0], sizes), scale=4)


@pytest.mark.parametrize("fmt", ["int8.token_channel", "int4.awq.g32", "fp8.block128"])
def test_a_tokens_result_is_its_own_in_codes(level: str, fmt: str) -> None:
    w13, w2 = moe.pack(quantized(fmt, 4, 64, 128)), moe.pack(quantized(fmt, 4, 128, 32))
    x, weights, ids = torch.randn(120, 128).bfloat16(), torch.rand(120, 2), distinct(120, 4, 2)
    whole = moe.fused(x, w13, w2, weights, ids, ExpertSpec())
    for at in (slice(0, 1), slice(3, 6), slice(40, 120)):
        assert torch.equal(moe.fused(x[at], w13, w2, weights[at], ids[at], ExpertSpec()), whole[at])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_inverts_pack(level: str, dtype: torch.dtype) -> None:
    first, second = stack(3, 33, 7, dtype=dtype), stack(3, 33, 7, dtype=dtype)
    packed = moe.pack(first)
    assert packed.layout == moe.LAYOUT
    assert torch.equal(moe.unpack(packed)["weight"], first["weight"])
    address = packed["packed"].data_ptr()
    assert moe.pack(second, packed) is packed
    assert packed["packed"].data_ptr() == address
    assert torch.equal(moe.unpack(packed)["weight"], second["weight"])


def test_wrong_sizes_are_refused(level: str) -> None:
    w13, w2 = (moe.pack(stack(2, *shape, dtype=torch.float32)) for shape in ((64, 32), (32, 32)))
    ids = torch.zeros(5, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"stacks of \[64, 32\] and \[32, 32\] do not fit x of 30 columns"):
        moe.fused(torch.randn(5, 30), w13, w2, torch.ones(5, 1), ids, ExpertSpec())
    with pytest.raises(RuntimeError, match=r"experts take \[T, M\]"):
        moe.fused(torch.randn(4, 32), w13, w2, torch.ones(5, 1), ids, ExpertSpec())
