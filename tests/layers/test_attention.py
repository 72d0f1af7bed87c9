"""What an attention layer holds beside its projections: sinks, and the scales of a quantised cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sglang_core.errors import ConfigError
from sglang_core.layers.attention import Attention
from sglang_core.layers.build import BuildContext, named_layers
from sglang_core.layers.kv_scales import KVScales
from sglang_core.layers.kv_scheme import KVScheme, read_kv_scheme
from sglang_core.layers.model_config import ModelConfig
from tests.models.harness import build_context
from tests.weights.test_loader import CONFIG, Ranked

SINKS = torch.tensor([0.5, -1.25, 3.0, 7.0])


def attention(ctx: BuildContext, **facts: Any) -> Attention:
    """A layer, bound, that has taken its weights but for the projections'."""
    cfg = ModelConfig.from_hf(CONFIG).replace(**facts)
    root = nn.Module()
    root.self_attn = Attention(cfg, 0)
    for name, layer in named_layers(root):
        layer.name = name
        layer.bind(ctx)
    return root.self_attn


def test_sinks_are_dealt_to_ranks_with_their_heads() -> None:
    for rank, mine in ((0, [0.5, -1.25]), (1, [3.0, 7.0])):
        layer = attention(build_context(tp=Ranked(rank, 2)), attn_sinks=True)
        (spec,) = layer.weights("self_attn")
        assert (spec.name, spec.shape, spec.dtype) == ("self_attn.sinks", (4,), torch.float32)
        assert spec.ranges is not None
        layer.load([SINKS[slice(*spec.ranges[0])]])
        assert layer.sinks is not None and layer.sinks.tolist() == mine
        assert layer.spec.has_sinks


def test_a_layer_without_sinks_asks_for_none() -> None:
    layer = attention(build_context())
    assert layer.weights("self_attn") == [] and layer.sinks is None and not layer.spec.has_sinks


@pytest.mark.parametrize(("kv_dtype", "names"), [("bfloat16", []), ("int8", []), ("fp8_e4m3", ["k_scale", "v_scale"])])
def test_only_fp8_asks_for_scales(kv_dtype: str, names: list[str]) -> None:
    layer = attention(build_context(kv_dtype=kv_dtype))
    assert [spec.name for spec in layer.kv_scales.weights("self_attn.kv_scales")] == [f"self_attn.{n}" for n in names]
    assert layer.spec.kv_dtype == kv_dtype


def test_latents_have_one_scale_and_no_heads() -> None:
    scales = KVScales(1, KVScheme(), latent=True)
    scales.bind(build_context(kv_dtype="fp8_e4m3"))
    assert [spec.name for spec in scales.weights("a.kv_scales")] == ["a.k_scale"]
    scales.load([torch.tensor([0.25])])
    assert scales.k_scale.tolist() == scales.v_scale.tolist() == [0.25]
    with pytest.raises(ConfigError, match="latents have no heads"):
        KVScales(1, KVScheme(scales="head"), latent=True).bind(build_context(kv_dtype="fp8_e4m3"))


FP8: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    ("raw", "scheme"),
    [
        ({}, None),
        ({"kv_cache_scheme": None, "kv_cache_quant_algo": None}, None),
        ({"kv_cache_scheme": FP8}, KVScheme()),
        ({"kv_cache_scheme": FP8 | {"strategy": "attn_head"}}, KVScheme(scales="head")),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, KVScheme()),
        ({"kv_cache_scheme": "static"}, KVScheme()),
        ({"kv_cache_quant_algo": "FP8"}, KVScheme()),
    ],
)
def test_what_checkpoints_say_of_their_cache(raw: dict[str, Any], scheme: KVScheme | None) -> None:
    assert read_kv_scheme(raw) == scheme


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ({"kv_cache_scheme": FP8 | {"num_bits": 4}}, "num_bits=4"),
        ({"kv_cache_scheme": FP8 | {"type": "int"}}, "type='int'"),
        ({"kv_cache_scheme": FP8 | {"dynamic": True}}, "dynamic=True"),
        ({"kv_cache_scheme": FP8 | {"strategy": "channel"}}, "strategy='channel'"),
        ({"kv_cache_scheme": "dynamic"}, "'dynamic'"),
        ({"kv_cache_quant_algo": "NVFP4"}, "NVFP4"),
    ],
)
def test_what_is_not_known_is_kept_as_the_reason(raw: dict[str, Any], found: str) -> None:
    scheme = read_kv_scheme(raw)
    assert scheme is not None and found in scheme.problem
    assert replace(scheme, problem="") == KVScheme()
