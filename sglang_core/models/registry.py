"""Architecture, as config.json names it, to model class. Classes are imported once they are asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from sglang_core.errors import ConfigError, PluginError
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.model_config import ModelConfig

_HERE = "sglang_core.models"
ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": f"{_HERE}.llama:LlamaForCausalLM",
    "MistralForCausalLM": f"{_HERE}.llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": f"{_HERE}.llama:LlamaForCausalLM",
    "Qwen3ForCausalLM": f"{_HERE}.llama:LlamaForCausalLM",
    "MixtralForCausalLM": f"{_HERE}.mixtral:MixtralForCausalLM",
    "Qwen2MoeForCausalLM": f"{_HERE}.qwen_moe:QwenMoEForCausalLM",
    "Qwen3MoeForCausalLM": f"{_HERE}.qwen_moe:QwenMoEForCausalLM",
    "Qwen3NextForCausalLM": f"{_HERE}.qwen3_next:Qwen3NextForCausalLM",
    "Phi3ForCausalLM": f"{_HERE}.llama:LlamaForCausalLM",
    "Gemma2ForCausalLM": f"{_HERE}.gemma2:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": f"{_HERE}.gemma3:Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration": f"{_HERE}.gemma3:Gemma3ForConditionalGeneration",
    "GptOssForCausalLM": f"{_HERE}.gpt_oss:GptOssForCausalLM",
    "DeepseekV2ForCausalLM": f"{_HERE}.deepseek:DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": f"{_HERE}.deepseek:DeepseekV3ForCausalLM",  # V3, R1, Kimi-K2
}


def create_model(
    hf_config: Mapping[str, Any], *, trust_remote_code: bool = False, extra: Mapping[str, str] | None = None
) -> CausalLM:
    """The model that a config.json describes: shapes only, no tensor yet. `weights.loader.load_model` makes it run.

    `extra` are architectures from plugins (hook `sglang_models`), which win over ours. Raises ConfigError where none fits.
    """
    found = model_class(hf_config, trust_remote_code=trust_remote_code, extra=extra)
    return found(found.read_config(hf_config))


def model_config(hf_config: Mapping[str, Any], *, extra: Mapping[str, str] | None = None) -> ModelConfig:
    """The facts in a config.json, as its model class reads them."""
    return model_class(hf_config, trust_remote_code=True, extra=extra).read_config(hf_config)


def model_class(
    hf_config: Mapping[str, Any], *, trust_remote_code: bool = False, extra: Mapping[str, str] | None = None
) -> type[CausalLM]:
    """The class for the first architecture in `architectures` that is known. Raises ConfigError where none is."""
    known = {**ARCHITECTURES, **(extra or {})}
    wanted = hf_config.get("architectures") or []
    target = next((known[name] for name in wanted if name in known), None)
    if target is None:
        raise ConfigError(_unknown(wanted, known, hf_config))
    if hf_config.get("auto_map") and not trust_remote_code and hf_config.get("model_type") not in _OURS:
        raise ConfigError(
            f"the checkpoint brings its own code (auto_map: {', '.join(map(str, hf_config['auto_map']))}); it would not be run "
            "here, and its model may differ from ours: pass --trust-remote-code to serve it with our implementation"
        )
    return _import(target)


# Model types whose own code, where a checkpoint still ships it, is the same as what transformers took in.
_OURS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gemma3"}
    | {"qwen3_next", "deepseek_v2", "deepseek_v3", "kimi_k2"}
)


def _unknown(wanted: list[str], known: Mapping[str, str], hf_config: Mapping[str, Any]) -> str:
    if not wanted:
        return f"config.json names no architecture; it must have one of {', '.join(sorted(known))} in `architectures`"
    near = difflib.get_close_matches(wanted[0], known, n=1, cutoff=0.5)
    hint = f" (nearest: {near[0]})" if near else ""
    remote = ", and its own code (auto_map) is never run here" if hf_config.get("auto_map") else ""
    return (
        f"architecture {wanted[0]!r} is not supported{remote}; there are {', '.join(sorted(known))}{hint}. "
        "A plugin can add it through the hook sglang_models"
    )


def _import(target: str) -> type[CausalLM]:
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise PluginError(f"model class {target!r} cannot be imported: {e}") from e
    if not (isinstance(found, type) and issubclass(found, CausalLM)):
        raise PluginError(f"model class {target!r} is no CausalLM")
    return found
