"""Checkpoints whose parts are stored unlike, and those that only some of a model's matrices are quantised in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_core.errors import ConfigError
from sglang_core.layers.build import bind_model, packings
from sglang_core.layers.experts import Experts
from sglang_core.layers.linear import Linear
from sglang_core.layers.packing import totals
from sglang_core.layers.quant_config import read_quant_config
from sglang_core.layers.stored import DENSE
from sglang_core.models.registry import create_model
from sglang_core.ops import quant
from tests.models.harness import Stepper, build_context
from tests.weights.test_loader import Ranked
from tests.weights.test_quantised import BLOCK, CONFIG, F8, TOKEN, TOKENS, W4, ct, load, load_plain, write
from tests.weights.test_quantised_experts import MOE


def merged(
    folder: Path, config: dict[str, Any], parts: dict[str, str], quantization: dict[str, Any]
) -> dict[str, Tensor]:
    """One checkpoint of several kinds, `parts` saying which names are of which; gives its dequantised tensors."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for part, kind in parts.items():
        source = folder / kind.replace(" ", "-")
        source.mkdir()
        values = write(source, kind, config=config)
        tensors |= {n: t for n, t in load_file(source / "model.safetensors").items() if part in n}
        plain |= {n: t for n, t in values.items() if part in n}
    rest = {n: t for n, t in values.items() if n not in plain}
    save_file(tensors | rest, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return plain | rest


def check(folder: Path, plain: dict[str, Tensor], config: dict[str, Any], bound: float) -> dict[str, str]:
    """Logits are those of the dequantised tensors; gives the format of each layer by its name's last part."""
    model = load(folder)
    ours, theirs = Stepper(model).logits(TOKENS), Stepper(load_plain(plain, folder, config)).logits(TOKENS)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < bound
    return {n.rpartition(".")[2]: m.fmt.name for n, m in model.named_modules() if isinstance(m, Linear | Experts)}


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "experts"])
def test_two_groups_of_compressed_tensors(config: dict[str, Any], tmp_path: Path) -> None:
    two = ct(W4, None)
    fp8 = {"targets": ["re:.*self_attn.*"], "weights": F8 | {"strategy": "channel", "symmetric": True}}
    two["config_groups"]["group_1"] = fp8 | {"input_activations": F8 | TOKEN, "format": "float-quantized"}
    plain = merged(tmp_path, config, {".self_attn.": "ct fp8", ".mlp.": "ct pack"}, two)
    formats = check(tmp_path, plain, config, 0.12)
    assert formats["qkv_proj"] == formats["o_proj"] == "fp8.token_channel"
    assert formats.get("experts", formats.get("down_proj")) == "int4.pack.g64"


def test_mixed_precision_of_modelopt(tmp_path: Path) -> None:
    at = "model.layers.0"
    layers = {f"{at}.self_attn.{n}_proj": {"quant_algo": "FP8"} for n in "qkvo"}
    layers |= {f"{at}.mlp.{n}_proj": {"quant_algo": "NVFP4", "group_size": 16} for n in ("gate", "up", "down")}
    quantization = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    plain = merged(tmp_path, CONFIG, {".self_attn.": "modelopt fp8", ".mlp.": "modelopt nvfp4"}, quantization)
    formats = check(tmp_path, plain, CONFIG, 0.3)
    assert (formats["o_proj"], formats["down_proj"]) == ("fp8.tensor.static", "nvfp4.g16.static")


def test_only_attention_is_quantised(tmp_path: Path) -> None:
    only = ct(W4, None) | {"ignore": ["lm_head", "re:.*mlp.*"]}
    plain = merged(tmp_path, MOE, {".self_attn.": "ct pack"}, only)
    formats = check(tmp_path, plain, MOE, 1e-4)
    assert (formats["qkv_proj"], formats["experts"], formats["gate"]) == ("int4.pack.g64", "dense", "dense")


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ({"quant_method": "compressed-tensors"}, "config_groups is missing"),
        (ct(W4, None) | {"config_groups": {"g": {"weights": W4}}}, r"targets=\[\]"),
        (ct(W4, None) | {"format": "marlin-24"}, "format='marlin-24'"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "quantized_layers is missing"),
        (
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {}}},
            "quant_algo=None",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, "group_size=None"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "desc_act=None"),
        ({}, r"quant_method='\?'"),
    ],
)
def test_half_of_a_scheme_is_refused(raw: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=rf"not supported: .*{found}.*Known are fp8, compressed-tensors"):
        read_quant_config(raw)


def test_globs_name_modules_and_what_is_in_them() -> None:
    raw = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.1.mlp.experts"],
    }
    c = read_quant_config(raw)
    assert c.layer("model.layers.0.mlp.experts").fmt.name == "mxfp4.g32"
    for name in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.experts",
        "model.layers.0.mlp.router",
        "lm_head",
    ):
        assert c.layer(name) is DENSE


DEEPSEEK = CONFIG | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 40,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_group": 1,
    "topk_group": 1,
}


def test_deepseek_in_fp8_blocks(tmp_path: Path) -> None:
    """As published: every matrix but router, head and embedding in blocks of 128 x 128, the last of which may be smaller."""
    plain = write(tmp_path, "fp8 block", config=DEEPSEEK, quantised=("_proj.weight", "_mqa.weight"))
    model = load(tmp_path)
    plans = {p.layer: p.plan for p in totals(packings(model))}
    assert plans.pop("LatentUpLinear") == "dequantized" and set(plans.values()) == {"reference"}
    checked = 0
    for name, module in model.named_modules():
        if name.endswith(("kv_b_proj", "o_proj", "q_b_proj", "kv_a_proj_with_mqa")):
            assert torch.equal(quant.dequantize(module.weight), plain[f"{name}.weight"])
            checked += 1
    assert checked == 8
    ours, theirs = Stepper(model).logits(TOKENS), Stepper(load_plain(plain, tmp_path, DEEPSEEK)).logits(TOKENS)
    differ = (ours - theirs).abs().amax(-1) / theirs.abs().max()
    assert float(differ.quantile(0.75)) < 0.12  # a token whose experts score alike may visit others


def test_blocks_are_dealt_to_ranks_whole(tmp_path: Path) -> None:
    config = MOE | {"num_key_value_heads": 4}
    for size, widths in ((256, (128, 128)), (384, (256, 128))):
        folder = tmp_path / str(size)
        folder.mkdir()
        one = config | {"moe_intermediate_size": size}
        write(folder, "fp8 block", config=one)
        layers = [next(m for m in load(folder, tp=Ranked(r, 2)).modules() if isinstance(m, Experts)) for r in range(2)]
        assert tuple(layer.width for layer in layers) == widths
        whole = next(m for m in load(folder).modules() if isinstance(m, Experts))
        down = torch.cat([quant.dequantize(layer.w2) for layer in layers], dim=2)
        assert torch.equal(down, quant.dequantize(whole.w2))
    model = create_model(config | {"moe_intermediate_size": 128, "quantization_config": BLOCK})
    with pytest.raises(ConfigError, match="has 1 parts of 128 that share a scale, too few for tp_size=2"):
        bind_model(model, build_context(tp=Ranked(0, 2)))
