"""Checkpoints that are quantised and bring scales for their cache: both are read, whatever the scales are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_core.config import EngineConfig
from sglang_core.engine.resolve import resolve
from sglang_core.ops.formats import Fmt
from sglang_core.weights.kv_scales import is_attention_scale, kv_scale_name
from tests.models.harness import Stepper
from tests.weights.test_quantised import KINDS, TOKENS, load, load_plain, logit_bound, write

KV_STEP = 2**-4  # activations that differ by their rounding are stored as neighbouring codes
AT = "model.layers.0.self_attn"
SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any], tuple[str, str]]] = {
    "modelopt fp8": ("modelopt fp8", {"kv_cache_quant_algo": "FP8"}, ("k_proj.k_scale", "v_proj.v_scale")),
    "compressed-tensors fp8": ("ct fp8", {"kv_cache_scheme": SCHEME}, ("k_scale", "v_scale")),
    "compressed-tensors int8": ("ct int8", {"kv_cache_scheme": SCHEME}, ("attn.k_scale", "attn.v_scale")),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_and_cache_are_both_as_the_checkpoint_has_them(name: str, tmp_path: Path) -> None:
    kind, more, names = CHECKPOINTS[name]
    scales = {f"{AT}.{names[0]}": torch.tensor(0.03125), f"{AT}.{names[1]}": torch.tensor([0.5])}
    plain = write(tmp_path, kind, lambda tensors: tensors.update(scales))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= more
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (
        resolve(EngineConfig.from_flat(model_path=str(tmp_path), device="cpu")).config.cache.kv_cache_dtype
        == "fp8_e4m3"
    )

    ours = Stepper(load(tmp_path, kv_dtype="fp8_e4m3"))
    (pool,) = ours.pools.values()
    assert pool.k_scale(0).tolist() == [0.03125] * 2 and pool.v_scale(0).tolist() == [0.5] * 2
    load_plain(plain | scales, tmp_path)
    want, got = Stepper(load(tmp_path / "plain", kv_dtype="fp8_e4m3")).logits(TOKENS), ours.logits(TOKENS)
    assert float((got - want).abs().max() / want.abs().max()) < logit_bound(Fmt.parse(KINDS[kind][0])) + KV_STEP


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("k_scale", "k_scale"),
        ("attn.v_scale", "v_scale"),
        ("k_proj.k_scale", "k_scale"),
        ("v_proj.v_scale", "v_scale"),
        ("qkv_proj.k_scale", "k_scale"),
        ("v_proj.output_scale", "v_scale"),
        ("kv_scale", "kv_scale"),
        ("k_proj.weight_scale", "k_proj.weight_scale"),
        ("q_proj.output_scale", "q_proj.output_scale"),
        ("o_proj.input_scale", "o_proj.input_scale"),
    ],
)
def test_names(name: str, meant: str) -> None:
    assert kv_scale_name(f"{AT}.{name}") == f"{AT}.{meant}"


def test_what_nothing_reads() -> None:
    for name in ("k_scale", "v_scale", "q_scale", "prob_scale", "attn.q_scale", "q_proj.q_scale"):
        assert is_attention_scale(f"{AT}.{name}")
    for name in ("q_proj.weight_scale", "k_proj.input_scale", "kv_scale", "k_norm.weight", "k_scaled"):
        assert not is_attention_scale(f"{AT}.{name}")
