from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from sglang_core.errors import ConfigError, PluginError
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.model_config import ModelConfig
from sglang_core.models.llama import LlamaForCausalLM
from sglang_core.models.registry import ARCHITECTURES, create_model, model_class, model_config
from tests.models.tiny import CASES, SIZES, hf_model

CONFIGS = Path(__file__).parents[2] / "benchmarks" / "configs"


def test_every_architecture_is_importable() -> None:
    for name in ARCHITECTURES:
        assert issubclass(model_class({"architectures": [name]}), CausalLM)


def test_constructors_make_no_tensor() -> None:
    for file in CONFIGS.glob("*.json"):
        model = create_model(json.loads(file.read_text()))
        assert not list(model.parameters())
        assert not list(model.buffers())


def test_unknown_architecture_names_the_nearest_and_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r"'Qwen4ForCausalLM' is not supported.*LlamaForCausalLM.*nearest: Qwen\dForC"
    ):
        model_class({"architectures": ["Qwen4ForCausalLM"]})
    with pytest.raises(ConfigError, match="names no architecture"):
        model_class({})


def test_remote_code_is_never_taken_for_ours() -> None:
    remote = {"architectures": ["LlamaForCausalLM"], "model_type": "my_llama", "auto_map": {"AutoModel": "m.Model"}}
    with pytest.raises(ConfigError, match=r"auto_map.*--trust-remote-code"):
        model_class(remote)
    assert model_class(remote, trust_remote_code=True) is LlamaForCausalLM
    # Phi-3 still ships the code that transformers took in.
    assert model_class(remote | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]})


def test_a_plugin_adds_an_architecture() -> None:
    extra = {"MyForCausalLM": "sglang_core.models.llama:LlamaForCausalLM"}
    assert model_class({"architectures": ["MyForCausalLM"]}, extra=extra) is LlamaForCausalLM
    for target in ("nowhere:Model", "sglang_core.models.llama:Missing", "json:JSONDecoder"):
        with pytest.raises(PluginError, match=target):
            model_class({"architectures": ["X"]}, extra={"X": target})


def test_quantised_and_broken_configs_are_refused() -> None:
    good = json.loads((CONFIGS / "qwen3-0.6b.json").read_text())
    bad: dict[str, dict[str, object]] = {
        "quantised \\(fp8\\)": {"quantization_config": {"quant_method": "fp8"}},
        "hidden_size=None": {"hidden_size": None},
        "hidden_act='relu6'": {"hidden_act": "relu6"},
        "layer_types has 2 entries": {"layer_types": ["a", "b"], "sliding_window": 4, "use_sliding_window": True},
        "rope_type='odd'": {"rope_scaling": {"rope_type": "odd"}},
        "use_bidirectional_attention": {"use_bidirectional_attention": True},
    }
    for message, change in bad.items():
        with pytest.raises(ConfigError, match=message):
            model_config(good | change)


def test_facts_of_published_configs() -> None:
    qwen = model_config(json.loads((CONFIGS / "qwen3-0.6b.json").read_text()))
    assert (qwen.qk_norm, qwen.qkv_bias, qwen.tie_embeddings, qwen.head_dim) == (True, False, True, 128)
    assert set(qwen.windows) == {None}
    llama = model_config(json.loads((CONFIGS / "llama-3.2-1b.json").read_text()))
    assert llama.ropes[0].kind == "llama3"
    assert (llama.ropes[0].factor, llama.ropes[0].original_max_position) == (32.0, 8192)


@pytest.mark.parametrize("name", [*dict.fromkeys(case.config for case in CASES.values())])
def test_our_defaults_are_those_of_transformers(name: str) -> None:
    """What a config.json leaves out: the model from an empty file is the model from the file transformers would write."""
    config = getattr(transformers, name)()
    told = {k: getattr(config, k) for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    told |= {"num_attention_heads": config.num_attention_heads, "model_type": config.model_type, "architectures": ["A"]}
    whole = {**config.to_dict(), "architectures": ["A"], "dtype": None}
    assert ModelConfig.from_hf(told) == ModelConfig.from_hf(whole)


def test_config_files_of_older_generations_mean_the_same() -> None:
    """transformers 4 wrote rope_theta and rope_scaling, and patterns in place of layer_types."""
    new = hf_model("llama31").config.to_dict()
    rope = dict(new.pop("rope_parameters"))
    old = new | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": new.pop("dtype")}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(hf_model("llama31").config.to_dict())

    new = {**hf_model("gemma3").config.to_dict(), "layer_types": ["sliding_attention", "full_attention"] * 3}
    new |= {"num_hidden_layers": 6}
    old = dict(new)
    del old["rope_parameters"], old["layer_types"]
    old |= {"rope_theta": 1000.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 20.0}
    assert ModelConfig.from_hf(old | {"sliding_window_pattern": 2}) == ModelConfig.from_hf(new)


def test_the_text_part_of_a_nested_config() -> None:
    text = hf_model("gemma3").config.to_dict()
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "dtype": "bfloat16", "text_config": dict(text)}
    del nested["text_config"]["dtype"]
    cfg = model_config(nested)
    assert cfg.dtype == "bfloat16"
    assert cfg.replace(architecture="", dtype="") == ModelConfig.from_hf(text).replace(architecture="", dtype="")


def test_every_case_covers_a_registered_architecture() -> None:
    assert {case.model for case in CASES.values()} == ARCHITECTURES.keys() - {"Gemma3ForConditionalGeneration"}
    assert SIZES["vocab_size"] % 2 and torch.get_default_dtype() == torch.float32
