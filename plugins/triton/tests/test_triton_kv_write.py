"""Codes of fp8 and int8, bit for bit, and writes to pools of every dtype."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from sglang_triton.codes import decode_e4m3, encode_e4m3
from sglang_triton.kv_write import kv_write, kv_write_mla

from sglang_core.api import Pool, PoolSpec
from sglang_core.api.ops import OPS


@triton.jit
def _encode(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, encode_e4m3(tl.load(x + at)))


@triton.jit
def _decode(x, y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at, decode_e4m3(tl.load(x + at)))


def test_every_code_decodes_to_its_number() -> None:
    codes, y = torch.arange(256, dtype=torch.int32).to(torch.uint8), torch.empty(256)
    _decode[(1,)](codes, y, N=256)
    torch.testing.assert_close(y, codes.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


def test_numbers_encode_as_torch_rounds_them() -> None:
    """Every code's number, what lies halfway between two and next to that, subnormals, and what saturates."""
    exact = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    half = (exact[1:] + exact[:-1]) / 2
    x = torch.cat(
        [exact, half, half.nextafter(exact[1:]), half.nextafter(exact[:-1]), torch.randn(500) * 8, exact[-1:] + 1e3]
    )
    x = torch.cat([x, -x, torch.tensor([float("nan"), float("inf"), -float("inf")])])
    x = torch.cat([x, x.new_zeros(4096 - len(x))])
    y = torch.empty(4096, dtype=torch.uint8)
    _encode[(1,)](x, y, N=4096)
    want = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    torch.testing.assert_close(y.view(torch.float8_e4m3fn).float(), want.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y[:100], want[:100].view(torch.uint8))


KV_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["full", "mla"])
def test_slots_hold_what_the_body_writes(kind: str, dtype: torch.dtype) -> None:
    """And no other slot is touched: pools begin as the same bytes. Keys and values are slices of something wider."""
    torch.manual_seed(0)
    heads, dim, v_dim = (1, 24, 8) if kind == "mla" else (3, 20, 40)
    spec = PoolSpec(
        kind=kind,  # type: ignore[arg-type]
        num_layers=2,
        page_size=4,
        num_kv_heads=heads,
        head_dim=dim,
        v_head_dim=v_dim,
        dtype=dtype,
    )
    pools = [Pool(spec, 5, torch.device("cpu")) for _ in range(2)]
    for pool in pools:
        for leaf in pool.leaves:
            leaf.view(torch.uint8).fill_(7)
        if spec.scaling == "static":
            pool.set_scales(1, torch.linspace(0.5, 2.0, heads), torch.linspace(0.01, 0.1, heads))
    slots = torch.tensor([4, 19, 7, 0, 12], dtype=torch.int32)
    k, v = (4 * torch.randn(5, heads, width + 3)[..., 3:].to(torch.bfloat16) for width in (dim, v_dim))
    k[2] = 0.0
    if kind == "mla":
        kv_write_mla(k[:, 0], v[:, 0], pools[0], 1, slots)
        OPS["kv.write_mla"].body(k[:, 0], v[:, 0], pools[1], 1, slots)
    else:
        kv_write(k, v, pools[0], 1, slots)
        OPS["kv.write"].body(k, v, pools[1], 1, slots)
    for got, want in zip(*(pool.leaves for pool in pools), strict=True):
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_no_tokens_write_nothing() -> None:
    spec = PoolSpec(num_layers=1, page_size=2, num_kv_heads=1, head_dim=4, v_head_dim=4, dtype=torch.float32)
    pool = Pool(spec, 2, torch.device("cpu"))
    before = [leaf.fill_(1.0).clone() for leaf in pool.leaves]
    kv_write(torch.empty(0, 1, 4), torch.empty(0, 1, 4), pool, 0, torch.empty(0, dtype=torch.int32))
    assert all(map(torch.equal, before, pool.leaves))
