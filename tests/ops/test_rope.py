"""Rope tables and rotations against transformers' own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_neox

from sglang_core.errors import ConfigError
from sglang_core.ops.rope import RopeSpec, inverse_frequencies, rope_apply, rope_table

ORIGINAL, MAX = 4096, 16384
HALF = 32  # of the head dim, 64
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0},
    "yarn, given": {"factor": 4.0, "attention_factor": 1.3, "beta_fast": 24.0, "beta_slow": 2.0},
    "yarn, mscale": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn, not truncated": {"factor": 32.0, "truncate": False},
    "longrope": {
        "short_factor": [1.0 + 0.01 * i for i in range(HALF)],
        "long_factor": [1.0 + 0.5 * i for i in range(HALF)],
    },
}


def config(kind: str, **params: Any) -> dict[str, Any]:
    rope = {"rope_type": kind, "rope_theta": 50_000.0} | params
    if kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = ORIGINAL
    return {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "head_dim": 2 * HALF,
        "max_position_embeddings": MAX,
        "rope_parameters": rope,
    }


def theirs(cfg: dict[str, Any], seq_len: int) -> tuple[torch.Tensor, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf = LlamaConfig(**{k: dict(v) if isinstance(v, dict) else v for k, v in cfg.items()})
        return ROPE_INIT_FUNCTIONS[hf.rope_parameters["rope_type"]](hf, torch.device("cpu"), seq_len=seq_len)


@pytest.mark.parametrize("length", [2000, ORIGINAL, ORIGINAL + 1, MAX, 3 * MAX])
@pytest.mark.parametrize("name", KINDS)
def test_frequencies_are_transformers(name: str, length: int) -> None:
    cfg = config(name.split(",")[0], **KINDS[name])
    spec = RopeSpec.from_config(cfg)
    freqs, factor = theirs(cfg, length)
    torch.testing.assert_close(inverse_frequencies(spec, length), freqs, atol=0, rtol=2e-6)
    assert spec.attention_factor == pytest.approx(factor)
    hash(spec)


def test_default_frequencies() -> None:
    spec = RopeSpec.from_config(config("default"))
    want = 50_000.0 ** (-torch.arange(0, 2 * HALF, 2).double() / (2 * HALF))
    torch.testing.assert_close(inverse_frequencies(spec, MAX).double(), want, atol=0, rtol=1e-6)


def test_table_is_cosines_then_sines_scaled() -> None:
    spec = RopeSpec.from_config(config("yarn", factor=4.0))
    angles = torch.arange(100).double()[:, None] * inverse_frequencies(spec, 100).double()
    want = torch.cat([angles.cos(), angles.sin()], 1) * spec.attention_factor
    table = rope_table(spec, 100)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table.double(), want, atol=1e-5, rtol=0)


def test_old_configs_mean_the_same() -> None:
    new = config("llama3", **KINDS["llama3"])
    rope = dict(new.pop("rope_parameters"))
    new["rope_theta"] = rope.pop("rope_theta")
    new["rope_scaling"] = rope
    assert RopeSpec.from_config(new) == RopeSpec.from_config(config("llama3", **KINDS["llama3"]))
    rope["type"] = rope.pop("rope_type")
    assert RopeSpec.from_config(new) == RopeSpec.from_config(config("llama3", **KINDS["llama3"]))


def test_a_config_with_no_scaling_and_a_null_one() -> None:
    plain = {"hidden_size": 256, "num_attention_heads": 4, "rope_theta": 1e6, "rope_scaling": None}
    spec = RopeSpec.from_config(plain)
    assert (spec.kind, spec.theta, spec.head_dim, spec.rotary_dim) == ("default", 1e6, 64, 64)


def test_partial_rotary() -> None:
    for cfg in (
        {"head_dim": 64, "partial_rotary_factor": 0.5, "rope_theta": 1e4},
        {"head_dim": 64, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ):
        assert RopeSpec.from_config(cfg).rotary_dim == 32


def test_layer_types_have_their_own() -> None:
    nested = {
        "head_dim": 64,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    old = {
        "head_dim": 64,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    for cfg in (nested, old):
        full = RopeSpec.from_config(cfg, layer_type="full_attention")
        sliding = RopeSpec.from_config(cfg, layer_type="sliding_attention")
        assert (full.kind, full.theta, full.factor) == ("linear", 1e6, 8.0)
        assert (sliding.kind, sliding.theta) == ("default", 1e4)


def test_longrope_reads_phi3_configs() -> None:
    cfg = config("longrope", **KINDS["longrope"])
    rope = cfg.pop("rope_parameters")
    cfg |= {"original_max_position_embeddings": ORIGINAL, "rope_theta": 50_000.0}
    cfg["rope_scaling"] = {
        "type": "su",
        "short_factor": rope["short_factor"],
        "long_factor": rope["long_factor"],
    }
    assert RopeSpec.from_config(cfg) == RopeSpec.from_config(config("longrope", **KINDS["longrope"]))


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ConfigError, match="'spiral'"):
        RopeSpec.from_config(config("spiral"))


@pytest.mark.parametrize("style", ["neox", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_apply_is_transformers_rotation(style: str, dtype: torch.dtype) -> None:
    spec = RopeSpec(head_dim=64, rotary_dim=64, style=style)  # type: ignore[arg-type]
    table = rope_table(spec, 500)
    q, k = torch.randn(7, 4, 64).to(dtype), torch.randn(7, 2, 64).to(dtype)
    positions = torch.tensor([0, 1, 499, 3, 3, 77, 250], dtype=torch.int32)
    cos, sin = table[positions].double().chunk(2, -1)
    if style == "neox":
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    else:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    rotate = rotate_neox if style == "neox" else rotate_interleaved
    want = rotate(*(x.double().transpose(0, 1)[None] for x in (q, k)), cos[None], sin[None])
    tolerance = max(torch.finfo(dtype).eps, 2e-7 if dtype == torch.float32 else 0) * 4
    for got, w in zip(rope_apply(q, k, positions, table, spec), want, strict=True):
        assert got.dtype == dtype
        # transformers' Cohere rotation works in float32
        torch.testing.assert_close(
            got.double(), w[0].transpose(0, 1).double(), atol=max(tolerance, 1e-6), rtol=tolerance
        )


def test_dims_past_rotary_dim_pass_untouched() -> None:
    spec = RopeSpec(head_dim=16, rotary_dim=8)
    q, k = torch.randn(3, 2, 16), torch.randn(3, 1, 16)
    positions = torch.tensor([1, 2, 3], dtype=torch.int32)
    rotated, _ = rope_apply(q, k, positions, rope_table(spec, 4), spec)
    assert torch.equal(rotated[..., 8:], q[..., 8:])
    whole = RopeSpec(head_dim=8, rotary_dim=8)
    part, _ = rope_apply(q[..., :8], k[..., :8], positions, rope_table(whole, 4), whole)
    assert torch.equal(rotated[..., :8], part)
