"""What pools of fp8 and int8 store, byte for byte, and what moves with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sglang_core.backend.kv_dtypes import KV_DTYPES, encode_fp8, encode_int8
from sglang_core.backend.pool import Pool, PoolSpec

CPU = torch.device("cpu")
SPEC = PoolSpec(num_layers=2, page_size=4, num_kv_heads=2, head_dim=8, v_head_dim=6, dtype=torch.float32)
QUANTISED = ("fp8_e4m3", "int8")


def pool_of(name: str, num_pages: int = 5, **changes: object) -> Pool:
    pool = Pool(replace(SPEC, dtype=KV_DTYPES[name], **changes), num_pages, CPU)  # type: ignore[arg-type]
    pool.poison(range(num_pages))
    return pool


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_fp8_is_the_nearest_code_and_saturates() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    codes = codes[codes.isfinite()]
    x = torch.cat([torch.randn(500) * 4.0 ** torch.arange(-5, 5).repeat(50), torch.tensor([449.0, -1e30, 448.0, 0.0])])
    scale = torch.tensor([0.37])
    made = encode_fp8(x[:, None, None], scale)[:, 0, 0].double()
    wanted = (x / 0.37).clamp(-448, 448).double()
    distance = (wanted[:, None] - codes).abs().min(1).values
    assert torch.equal((made - wanted).abs(), distance)
    assert made[-4:].tolist() == [448.0, -448.0, 448.0, 0.0]


def test_int8_takes_each_head_of_each_token_to_its_own_scale() -> None:
    x = torch.randn(7, 2, 8) * torch.tensor([1e-3, 50.0])[:, None]
    x[3, 1] = 0
    code, scale = encode_int8(x)
    assert code.dtype == torch.int8 and scale.shape == (7, 2, 1) and scale.dtype == torch.float32
    largest = x.abs().amax(-1)
    assert torch.equal(scale[..., 0], largest / 127)
    live = largest > 0
    assert (code.abs().amax(-1)[live] == 127).all() and not code[3, 1].any()
    assert ((code * scale - x).abs() <= scale * 0.5000001).all()


@pytest.mark.parametrize("name", KV_DTYPES)
def test_bytes_of_a_token_are_those_of_the_leaves(name: str) -> None:
    pool = pool_of(name)
    nbytes = sum(size for _, size in pool.regions())
    assert nbytes == pool.num_pages * pool.spec.bytes_per_page
    assert nbytes == sum(leaf.numel() * leaf.element_size() for leaf in pool.leaves)


def test_what_eight_bits_save() -> None:
    of = {
        name: replace(SPEC, head_dim=128, v_head_dim=128, dtype=KV_DTYPES[name]).bytes_per_token for name in KV_DTYPES
    }
    assert of["fp8_e4m3"] / of["bfloat16"] == 0.5
    assert of["int8"] / of["bfloat16"] == 0.5 * 132 / 128


@pytest.mark.parametrize("name", KV_DTYPES)
def test_gather_gives_what_scatter_took(name: str) -> None:
    pool = pool_of(name)
    if pool.spec.scaling == "static":
        pool.set_scales(1, torch.tensor([0.01, 0.02]), torch.tensor([0.05]))
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 6)
    pool.scatter(1, ints(5, 17, 6), k, v)
    got_k, got_v = pool.gather(1, ints(17, 5))
    bound = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11, "fp8_e4m3": 2.0**-4, "int8": 0.5 / 127}[name]
    for got, x in ((got_k, k), (got_v, v)):
        near = x[[1, 0]].abs() if name != "int8" else x[[1, 0]].abs().amax(-1, keepdim=True)
        assert ((got.float() - x[[1, 0]]).abs() <= near * bound * 1.0001 + 1e-4 * (name == "fp8_e4m3")).all()
        assert got.is_contiguous()
    assert pool.gather(1, ints(4))[0].isnan().all() and pool.gather(0, ints(5))[1].isnan().all()
    heads_k, heads_v = pool.gather_heads(1, ints(17, 5, 6, 6).view(2, 2), torch.float64)
    assert heads_k.shape == (2, 2, 2, 8) and heads_v.shape == (2, 2, 2, 6)
    torch.testing.assert_close(heads_k[0].transpose(0, 1), got_k.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(heads_v[0].transpose(0, 1), got_v.double(), rtol=1e-6, atol=0)


def raw(pool: Pool, slot: int) -> list[Tensor]:
    """The bytes of a slot, in every leaf."""
    return [leaf[slot // 4, slot % 4].clone().view(torch.uint8) for leaf in pool.leaves]


@pytest.mark.parametrize("name", KV_DTYPES)
def test_moves_and_transfers_keep_the_bytes(name: str) -> None:
    pool, other = pool_of(name), pool_of(name)
    for layer in range(2):
        pool.scatter(layer, ints(5, 6, 17), torch.randn(3, 2, 8), torch.randn(3, 2, 6))
    before = [raw(pool, slot) for slot in (5, 17)]
    pool.move(ints(17, 5), ints(5, 9))
    assert all(map(torch.equal, raw(pool, 5), before[1])) and all(map(torch.equal, raw(pool, 9), before[0]))
    for layer in range(2):
        other.import_pages(layer, ints(3), *pool.export_pages(layer, ints(1)))
    assert all(map(torch.equal, raw(other, 13), raw(pool, 5))) and all(map(torch.equal, raw(other, 14), raw(pool, 6)))


@pytest.mark.parametrize("name", QUANTISED)
def test_freed_pages_read_as_nan(name: str) -> None:
    pool = pool_of(name)
    pool.scatter(0, ints(4, 8), torch.ones(2, 2, 8), torch.ones(2, 2, 6))
    pool.poison([1])
    k, v = pool.gather(0, ints(4, 8))
    assert k[0].isnan().all() and v[0].isnan().all()
    assert k[1].isfinite().all() and v[1].isfinite().all()


def test_a_fingerprint_says_how_bytes_are_read() -> None:
    prints = {pool_of(name).fingerprint for name in KV_DTYPES}
    assert len(prints) == len(KV_DTYPES)
    scaled = pool_of("fp8_e4m3")
    scaled.set_scales(1, torch.tensor([0.5]), torch.tensor([1.0]))
    assert scaled.fingerprint not in prints
    assert pool_of("fp8_e4m3", num_pages=9).fingerprint in prints


def test_only_fp8_has_static_scales() -> None:
    for name in ("bfloat16", "int8"):
        with pytest.raises(AssertionError, match="no static scales"):
            pool_of(name).set_scales(0, torch.ones(1), torch.ones(1))
    with pytest.raises(AssertionError, match="no scales"):
        pool_of("float16").k_scale(0)
