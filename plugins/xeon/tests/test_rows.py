from __future__ import annotations

import pytest
import torch
from sglang_xeon import activation, embedding, norm, rope, sampling
from tolerance import assert_close

from sglang_core.api.ops import OPS, RopeSpec, SampleParams

DTYPES = [torch.bfloat16, torch.float32]


def body(op: str):
    return OPS[op].body


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024), (7, 33), (0, 64), (600, 128), (3, 5, 128), (64,), (2, 3, 4, 20)])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_rms_norm_is_the_body(level: str, dtype: torch.dtype, shape: tuple[int, ...], weight_dtype) -> None:
    x, w = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1]).to(weight_dtype or dtype)
    assert_close(norm.rms_norm(x, w, 1e-6), body("norm.rms")(x, w, 1e-6), scale=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_reads_views_of_a_merged_projection(level: str, dtype: torch.dtype) -> None:
    x, w = torch.randn(9, 8, 64).to(dtype)[:, 2:6], torch.randn(64).to(dtype)
    got = norm.rms_norm(x, w, 1e-6)
    assert got.is_contiguous()
    assert torch.equal(got, norm.rms_norm(x.contiguous(), w, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024), (7, 33), (0, 64), (600, 128), (3, 5, 128), (64,), (2, 3, 4, 20)])
def test_rms_norm_gated_is_the_body(level: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, gate, w = torch.randn(shape).to(dtype) * 3, torch.randn(shape).to(dtype) * 4, torch.randn(shape[-1]).to(dtype)
    assert_close(norm.rms_norm_gated(x, gate, w, 1e-6), body("norm.rms_gated")(x, gate, w, 1e-6), scale=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_gated_reads_a_gate_of_a_merged_projection(level: str, dtype: torch.dtype) -> None:
    """The norm of a dense x and the gate's heads lie apart by other strides."""
    x, projected, w = torch.randn(9, 4, 60).to(dtype), torch.randn(9, 700).to(dtype), torch.randn(60).to(dtype)
    gate = projected[:, 400:640].unflatten(1, (4, 60))
    assert torch.equal(norm.rms_norm_gated(x, gate, w, 1e-6), norm.rms_norm_gated(x, gate.contiguous(), w, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024), (7, 33), (0, 64), (300, 100)])
def test_add_rms_norm_is_the_body(level: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x, residual, w = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    kept = residual.clone()
    y, total = norm.add_rms_norm(x, residual, w, 1e-5)
    want_y, want_total = body("norm.add_rms")(x, residual, w, 1e-5)
    assert torch.equal(total, want_total)
    assert torch.equal(residual, kept)
    assert_close(y, want_y, scale=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 64), (5, 34), (0, 16), (40, 6144), (2, 3, 20)])
def test_gated_is_the_body(level: str, dtype: torch.dtype, kind, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).to(dtype) * 4
    assert_close(activation.gated(x, kind), body("act.gated")(x, kind), scale=4)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated_at_the_ends(level: str, kind) -> None:
    gate = torch.tensor([-1e4, -100.0, -90.0, -0.0, 0.0, 1e-30, 90.0, 100.0, 1e4])
    x = torch.cat([gate, torch.ones(9)])[None]
    assert_close(activation.gated(x, kind), body("act.gated")(x, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize(
    "tokens, heads, kv_heads, dim, rotary",
    [(1, 4, 2, 64, 64), (33, 3, 1, 20, 12), (0, 2, 2, 16, 16), (300, 16, 8, 128, 128)],
)
def test_rope_is_the_body(
    level: str, dtype, style, tokens: int, heads: int, kv_heads: int, dim: int, rotary: int
) -> None:
    spec = RopeSpec(head_dim=dim, rotary_dim=rotary, style=style)
    table = torch.randn(500, rotary)
    positions = torch.randint(0, 500, (tokens,), dtype=torch.int32)
    qk = torch.randn(tokens, heads + kv_heads, dim).to(dtype)
    q, k = qk.split((heads, kv_heads), dim=1)
    kept = qk.clone()
    for got, want in zip(
        rope.rope_apply(q, k, positions, table, spec), body("rope.apply")(q, k, positions, table, spec), strict=True
    ):
        assert_close(got, want, scale=4)
    assert torch.equal(qk, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 10])
def test_embed_lookup_is_the_body(level: str, dtype: torch.dtype, start: int) -> None:
    weight = torch.randn(20, 33).to(dtype)
    for ids in (torch.tensor([0, 10, 29, 30, 19, 10]), torch.tensor([])):
        ids = ids.int()
        assert torch.equal(embedding.embed_lookup(ids, weight, start), body("embed.lookup")(ids, weight, start))


def greedy(rows: int) -> SampleParams:
    zeros = torch.zeros(rows)
    return SampleParams(
        temperature=zeros,
        top_p=zeros + 1,
        top_k=torch.full((rows,), 1, dtype=torch.int32),
        min_p=zeros,
        seeds=zeros.int(),
        positions=zeros.int(),
        all_greedy=True,
        needs_filter=False,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab", [(1, 151936), (5, 33), (0, 10), (3, 1), (2, 1025)])
def test_greedy_sampling_is_the_body(level: str, dtype: torch.dtype, rows: int, vocab: int) -> None:
    logits = torch.randn(rows, vocab).to(dtype)  # bfloat16 has many equals: the lowest id wins
    ids, logprobs = sampling.sample(logits, greedy(rows), logprobs=True)
    want_ids, want_logprobs = body("sample.sample")(logits, greedy(rows), logprobs=True)
    assert ids.dtype == torch.int32
    assert ids.tolist() == want_ids.tolist()
    torch.testing.assert_close(logprobs, want_logprobs)


def test_greedy_sampling_at_the_ends(level: str) -> None:
    logits = torch.full((4, 3000), float("-inf"))
    logits[1, 2999] = -1e30
    logits[2, 2500] = float("nan")
    logits[2, 7] = 100.0
    logits[3, 1024] = logits[3, 2048] = 5.0
    assert sampling.sample(logits, greedy(4))[0].tolist() == [0, 2999, 2500, 1024]
