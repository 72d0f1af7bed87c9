"""bfloat16 weights whose exponents are coded: not a bit is lost, and products are those of the weights."""

from __future__ import annotations

import pytest
import torch
from sglang_xeon import gemm, isa, library, moe, weights
from tolerance import assert_close

from sglang_core.api import ConfigError
from sglang_core.api.ops import OPS, ExpertSpec, PackedWeight

SHAPES = [(16, 8), (1, 1), (33, 7), (100, 256), (257, 1030), (40, 2049)]
ODD_VALUES = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, float("inf"), float("-inf"), float("nan")]).bfloat16()


@pytest.fixture(autouse=True)
def packed_at_the_highest_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coded whatever this machine has: every level reads such weights."""
    monkeypatch.setattr(library, "level", lambda: "avx512_bf16")
    monkeypatch.delenv(isa.ENV_BF16, raising=False)


def normal(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 0.02).bfloat16()


def dense(weight: torch.Tensor) -> PackedWeight:
    stacked = weight.dim() == 3
    n, k = weight.shape[-2:]
    experts = weight.shape[0] if stacked else None
    return PackedWeight("dense", {"weight": weight}, out_features=n, in_features=k, num_experts=experts)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16)


def is_coded(w: PackedWeight) -> bool:
    return "escapes" in w._buffers


@pytest.mark.parametrize("shape", SHAPES)
def test_no_bit_is_lost(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]) -> None:
    monkeypatch.setattr(weights, "MOST_ESCAPES", 1.0)
    w = normal(*shape)
    w.view(-1)[: len(ODD_VALUES)] = ODD_VALUES[: w.numel()]
    w[-1] = torch.randint(-(2**15), 2**15, (shape[1],)).short().view(torch.bfloat16)  # whatever 16 bits can say
    packed = gemm.pack(dense(w))
    assert is_coded(packed)
    assert torch.equal(bits(gemm.unpack(packed)["weight"]), bits(w))


def test_three_quarters_of_the_bytes() -> None:
    w = normal(512, 1024)
    packed = gemm.pack(dense(w))
    assert sum(t.nbytes for t in packed.buffers()) < 0.76 * w.nbytes


def test_a_weight_of_many_exponents_stays_plain() -> None:
    w = torch.randint(-(2**15), 2**15, (64, 64)).short().view(torch.bfloat16)
    packed = gemm.pack(dense(w))
    assert not is_coded(packed)
    assert torch.equal(bits(gemm.unpack(packed)["weight"]), bits(w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("m", "shape"),
    [(1, (33, 7)), (2, (257, 1030)), (12, (100, 256)), (31, (40, 2049)), (97, (48, 264)), (400, (31, 96))],
)
def test_linear_is_the_body(
    level: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, m: int, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(weights, "MOST_ESCAPES", 1.0)
    x, w = torch.randn(m, shape[1]).to(dtype), normal(*shape)
    w.view(-1)[::97] *= 2.0**-30  # these have no code in most panels
    w.view(-1)[::193] *= 2.0**45
    packed, bias = gemm.pack(dense(w)), torch.randn(shape[0]).to(dtype)
    assert is_coded(packed)
    want = OPS["gemm.linear"].body(x.double(), dense(w.double()), bias.double()).to(dtype)
    size = float((x.double().abs() @ w.double().abs().T).max())
    assert_close(gemm.linear(x, packed, bias), want, scale=size)


def test_what_has_no_code_counts(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MOST_ESCAPES", 1.0)
    w = torch.full((16, 64), 0.5).bfloat16()
    w[:, :32] = (
        2.0 ** torch.arange(-40, 56, 3, dtype=torch.float32)
    ).bfloat16()  # 32 upper bytes, more than there are codes
    x = torch.eye(64).bfloat16()
    packed = gemm.pack(dense(w))
    assert int(packed["starts"][-1]) > 100
    for m in (1, 8, 64):
        assert torch.equal(gemm.linear(x[:m], packed), w.T[:m])
    w[3, 5] = float("nan")
    got = gemm.linear(x, gemm.pack(dense(w)))
    assert got[:, 3].isnan().all()
    assert not got[:, 4:].isnan().any()


def test_every_row_count_gives_the_same_rows(level: str) -> None:
    x, w = torch.randn(400, 1100).bfloat16(), gemm.pack(dense(normal(200, 1100)))
    assert int(w["starts"][-1]) > 0
    whole = gemm.linear(x, w)
    for m in (1, 2, 3, 5, 6, 7, 12, 13, 31, 96, 97):
        assert torch.equal(gemm.linear(x[:m], w), whole[:m]), f"{m} rows differ from {len(x)}"


def test_without_escapes_the_bits_are_those_of_plain_weights(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = (torch.rand(48, 300) + 1).bfloat16(), torch.randn(100, 300).bfloat16()
    coded = gemm.pack(dense(w))
    monkeypatch.setenv(isa.ENV_BF16, "plain")
    plain = gemm.pack(dense(w))
    assert is_coded(coded) and not is_coded(plain)
    for m in (1, 8, 100):
        assert torch.equal(gemm.linear(x[:m], coded), gemm.linear(x[:m], plain))


def test_experts_of_unequal_escapes(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MOST_ESCAPES", 1.0)
    w13, w2 = normal(4, 2 * 24, 40), normal(4, 40, 24)
    w13[2, ::3, ::5] *= 2.0**-30
    w2[1] = 0.25
    coded13, coded2 = moe.pack(dense(w13)), moe.pack(dense(w2))
    assert is_coded(coded13) and is_coded(coded2)
    assert torch.equal(moe.unpack(coded13)["weight"], w13)
    x, weight = torch.randn(30, 40).bfloat16(), torch.rand(30, 2)
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(30)]).int()
    want = OPS["moe.fused"].body(x.double(), dense(w13.double()), dense(w2.double()), weight, ids, ExpertSpec())
    assert_close(moe.fused(x, coded13, coded2, weight, ids, ExpertSpec()), want.bfloat16(), scale=40**0.5)
    sizes = torch.tensor([3, 0, 20, 7], dtype=torch.int32)
    want = OPS["gemm.grouped"].body(x.double(), dense(w13.double()), sizes)
    assert_close(moe.grouped(x, coded13, sizes), want.bfloat16(), scale=40**0.5)


def test_rewritten_where_it_lies_if_there_is_room() -> None:
    first, many, none = normal(64, 512), normal(64, 512), torch.full((64, 512), 0.5).bfloat16()
    many[0, ::40] *= 2.0**-30
    noise = torch.randint(-(2**15), 2**15, (64, 512)).short().view(torch.bfloat16)
    packed = gemm.pack(dense(first))
    addresses = [t.data_ptr() for t in packed.buffers()]
    for w in (many, none, noise, first):
        before = gemm.linear(torch.randn(2, 512).bfloat16(), packed)  # what an op keeps of a weight is of this one
        assert gemm.pack(dense(w), packed) is packed
        assert is_coded(packed) == (w is many or w is none)  # what is plain once stays so
        assert ([t.data_ptr() for t in packed.buffers()] == addresses) == is_coded(packed)
        assert torch.equal(bits(gemm.unpack(packed)["weight"]), bits(w))
        assert before.shape == gemm.linear(torch.randn(2, 512).bfloat16(), packed).shape


def test_only_where_decoding_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    for level, coded in (("avx2", False), ("avx512", False), ("avx512_bf16", True), ("amx", True)):
        assert isa.codes_exponents(level) == coded
    monkeypatch.setenv(isa.ENV_BF16, "zip")
    with pytest.raises(ConfigError, match="SGLANG_XEON_BF16='zip': it may be 'coded'"):
        isa.codes_exponents("amx")
