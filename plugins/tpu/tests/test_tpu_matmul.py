"""Products in Pallas, interpreted, against the ops' bodies in float64: every format, odd sizes, tiles that are not full."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from sglang_tpu import gemm, matmul, moe
from sglang_tpu.activations import quantized
from sglang_tpu.environment import to_jax, to_torch
from sglang_tpu.groups import grouping
from sglang_tpu.hlo import READS
from sglang_tpu.kernels import QUANTISED
from sglang_tpu.rounding import divided, to_fp8
from sglang_tpu.weights import pack, unpack

from sglang_core.api.ops import OPS, ExpertSpec, Fmt, PackedWeight

X_SCALE = 0.02
EVERY_PATH = (
    *("int8.token_channel", "int8.token_channel.asym", "fp8.tensor.static", "fp8.block128", "int4.awq.g128"),
    *("int4.gptq.g32", "int4.pack.g-1", "w4a8_fp8.g128", "mxfp4.g32", "nvfp4.g16"),
)
# A half of an ulp at each rounding; weights of groups shorter than the MXU is deep are rounded once more.
MOST = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def made(fmt: str, *shape: int) -> PackedWeight:
    generator = torch.Generator().manual_seed(len(fmt) + shape[-1])
    weight = torch.randn(shape, generator=generator) * 0.1
    static = torch.full((*shape[:-2], 1), X_SCALE) if Fmt.parse(fmt).static else None
    w: PackedWeight = OPS["quant.quantize"].body(weight, fmt, x_scale=static)
    return w


def rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(dtype)


def error(x: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((x.double() - oracle).norm() / oracle.norm())


@pytest.mark.parametrize("fmt", QUANTISED)
@pytest.mark.parametrize("shape", [(70, 320), (3, 40, 128)], ids=["matrix", "stack"])
def test_packing_loses_nothing(fmt: str, shape: tuple[int, ...]) -> None:
    w = made(fmt, *shape)
    back = unpack(pack(w))
    for name, tensor in w.named_buffers():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        assert back[name].view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize(
    ("fmt", "dtype"), [*((fmt, torch.float32) for fmt in EVERY_PATH), ("int4.awq.g128", torch.bfloat16)], ids=str
)
def test_a_quantised_linear_layer_is_the_op(fmt: str, dtype: torch.dtype) -> None:
    """640 columns are several chunks; the rows fill no tile, the output no block."""
    w, x, bias = made(fmt, 130, 640), rows(5, 640, dtype=dtype), rows(130)
    y = gemm.linear(x, pack(w), bias)
    assert y.dtype == dtype
    assert error(y, OPS["gemm.linear"].body(x.double(), w, bias.double())) < MOST[dtype]


def test_rows_in_several_tiles_and_columns_in_several_blocks() -> None:
    fmt, x = Fmt.parse("int8.token_channel"), rows(75, 256)
    w = made(fmt.name, 300, 256)
    tiles = matmul.Tiles(32, jnp.zeros(3, jnp.int32), jnp.full(1, 3, jnp.int32))
    tensors = {name: to_jax(t)[None] for name, t in pack(w).named_buffers()}
    y = matmul.product(
        quantized(to_jax(x), fmt), tensors, None, tiles, fmt=fmt, out_features=300, dtype=jnp.float32, block_bytes=1
    )
    assert error(to_torch(y)[:75], OPS["gemm.linear"].body(x.double(), w)) < MOST[torch.float32]


def test_tall_products_are_cut_into_tiles_that_fit() -> None:
    tiles = matmul.whole(2048, 14336, 2)
    assert tiles.height * 14336 * 2 <= matmul.ROWS_BYTES
    assert 2048 <= tiles.height * tiles.expert.shape[0] < 2048 + matmul.SUBLANES * tiles.expert.shape[0]


@pytest.mark.parametrize(("rows", "columns", "itemsize"), [(4096, 4096, 1), (4096, 14336, 2), (2048, 14336, 1)])
def test_tiles_of_a_bucket_leave_no_row_over(rows: int, columns: int, itemsize: int) -> None:
    """Else rows are filled up and results cut, and both copied."""
    tiles = matmul.whole(rows, columns, itemsize)
    assert tiles.height * tiles.expert.shape[0] == rows
    assert tiles.height * columns * itemsize <= matmul.ROWS_BYTES


@pytest.mark.parametrize("fmt", ["dense", "fp8.tensor.static", "int4.awq.g128"])
def test_groups_meet_their_own_matrices_and_rows_of_none_are_zeros(fmt: str) -> None:
    sizes = torch.tensor([3, 0, 40, 0, 1], dtype=torch.int32)
    x, w = rows(50, 128), made(fmt, 5, 96, 128)
    x[44:] = float("nan")
    y = gemm.grouped(x, w if fmt == "dense" else pack(w), sizes)
    assert not y[44:].any()
    body = OPS["gemm.grouped"].body(x[:44], w, sizes)
    assert error(y[:44], body.double()) < MOST[torch.float32]


def test_matrices_that_no_row_meets_are_not_read() -> None:
    """Every tile, and those past the last one too, names a matrix that has rows."""
    group = torch.tensor([6, 2, 6, 2, 9, 2], dtype=torch.int32)
    at = grouping(to_jax(group), 9, ["dense"])  # the ninth is none
    assert set(to_torch(at.tiles.expert).tolist()) == {2, 6} and int(at.tiles.count[0]) == 2
    placed, source = to_torch(at.place), to_torch(at.source)
    assert [int(source[placed[i]]) for i in (0, 1, 2, 3, 5)] == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("fmt", ["dense", "fp8.block128"])
@pytest.mark.parametrize("group", [[0, 0, 1, 1, 2, 6], [*range(7)] * 9, [4] * 80], ids=["few", "all", "one"])
def test_a_product_reads_no_more_than_it_says(fmt: str, group: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its grid is walked as a TPU does: a block is fetched where the one before it was another."""
    calls: list[tuple[dict[str, Any], dict[str, jax.Array]]] = []

    def recorded(*args: Any, **facts: Any) -> Any:
        kernel = pl.pallas_call(*args, **facts)
        return lambda expert, count, given: calls.append((facts, given)) or kernel(expert, count, given)

    monkeypatch.setattr(matmul, "pl", SimpleNamespace(**{**vars(pl), "pallas_call": recorded}))
    w = made(fmt, 7, 2048, 256)
    gemm.grouped(rows(len(group), 256), w if fmt == "dense" else pack(w), torch.bincount(torch.tensor(group)).int())
    facts, given = calls[0]
    at = grouping(to_jax(torch.tensor(sorted(group), dtype=torch.int32)), 7, [fmt]).tiles
    num_blocks, num_tiles = facts["grid_spec"].grid
    assert num_blocks == 2
    said = dict(zip(sorted(given), json.loads(facts["metadata"][READS])[2:], strict=True))
    for name, spec in facts["grid_spec"].in_specs[0].items():
        index = partial(spec.index_map, expert=to_torch(at.expert).numpy(), count=to_torch(at.count).numpy())
        wanted = [[int(i) for i in index(n, t)] for n in range(num_blocks) for t in range(num_tiles)]
        block = math.prod(size or 1 for size in spec.block_shape) * given[name].dtype.itemsize
        assert len(list(groupby(wanted))) * block <= said[name], name
    assert (said["weight"] < given["weight"].nbytes) == (len(set(group)) == 4)


@pytest.mark.parametrize("columns", [128, 96, 192])
def test_dense_stacks_of_any_width_are_the_op(columns: int) -> None:
    """Of rows that are not whole lanes a kernel reads columns."""
    x, w = rows(12, columns), made("dense", 3, 200, columns)
    sizes = torch.tensor([5, 0, 7], dtype=torch.int32)
    y, body = gemm.grouped(x, w, sizes), OPS["gemm.grouped"].body(x, w, sizes).double()
    assert error(y, body) < MOST[torch.float32]


@pytest.mark.parametrize("fmt", ["dense", "int8.token_channel"])
@pytest.mark.parametrize("act", [ExpertSpec(), ExpertSpec(activation="swiglu_clamped", weight_on_input=True)], ids=str)
def test_fused_experts_are_the_op(fmt: str, act: ExpertSpec) -> None:
    """Some experts are another rank's; the first token has none here."""
    x, w13, w2 = rows(9, 128), made(fmt, 4, 256, 128), made(fmt, 4, 128, 128)
    ids = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i))[:2] for i in range(9)]).int()
    ids[0] = torch.tensor([1, 4])
    expert_map = torch.tensor([3, -1, 0, 1, -1, 2], dtype=torch.int32)
    weights, bias = rows(9, 2).sigmoid(), rows(4, 256)
    more = {"bias13": bias, "expert_map": expert_map}
    packed = [w if fmt == "dense" else pack(w) for w in (w13, w2)]
    y = moe.fused(x, *packed, weights, ids, act, **more)
    body = OPS["moe.fused"].body(x, w13, w2, weights, ids, act, **more)
    assert not y[0].any()
    assert error(y, body.double()) < 2 * MOST[torch.float32]


def test_quotients_are_rounded_once() -> None:
    """Of x / s, where a row has one s, XLA makes x * (1 / s): some 30% of the results are another number."""
    x = rows(64, 1024)
    s = x.abs().amax(1, keepdim=True)
    assert to_torch(jax.jit(divided)(to_jax(x), to_jax(s))).equal(x / s)
    assert to_torch(jax.jit(lambda s: divided(s, 127.0))(to_jax(s))).equal(s / 127.0)


def test_fp8_is_rounded_once() -> None:
    """Every number of float16's width between two codes, and what saturates."""
    x = torch.cat(
        [torch.linspace(-500, 500, 20_001), torch.linspace(-0.03, 0.03, 20_001), torch.tensor([1e9, 17.0001])]
    )
    made = to_torch(to_fp8(to_jax(x)))
    assert made.view(torch.uint8).equal(x.to(torch.float8_e4m3fn).view(torch.uint8))
