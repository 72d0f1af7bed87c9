"""Every "auto" is settled once: the user wins over the backend, the backend over the generic defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_core import demo
from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.interface import DefaultsContext
from sglang_core.config import EngineConfig
from sglang_core.engine import resolve as resolving
from sglang_core.engine.resolve import GENERIC_DEFAULTS, resolve
from sglang_core.errors import ConfigError, PluginError
from sglang_core.models.llama import LlamaForCausalLM


def settled(**settings: Any) -> EngineConfig:
    return resolve(EngineConfig.from_flat(**({"model_path": "demo", "device": "cpu"} | settings))).config


@pytest.fixture
def wishes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the backend would like; fill it before resolving."""
    wished: dict[str, Any] = {}

    def config_defaults(self: CpuBackend, ctx: DefaultsContext) -> dict[str, Any]:
        assert ctx.model["model_type"] == "qwen3"
        return wished

    monkeypatch.setattr(CpuBackend, "config_defaults", config_defaults)
    return wished


def test_user_then_backend_then_generic(wishes: dict[str, Any]) -> None:
    wishes.update(page_size=32, chunked_prefill_size=512)
    config = settled(page_size=8)
    assert config.cache.page_size == 8
    assert config.schedule.chunked_prefill_size == 512
    assert config.schedule.max_running_requests == GENERIC_DEFAULTS["max_running_requests"]


def test_dtype_comes_from_the_user_the_backend_or_the_checkpoint(wishes: dict[str, Any]) -> None:
    assert settled().model.dtype == "bfloat16"
    assert settled().cache.kv_cache_dtype == "bfloat16"
    wishes["dtype"] = "float32"
    assert settled().model.dtype == "float32"
    assert settled(dtype="bfloat16").model.dtype == "bfloat16"
    assert settled(kv_cache_dtype="bfloat16").cache.kv_cache_dtype == "bfloat16"


def test_no_prefill_is_captured_where_results_may_not_depend_on_neighbours(wishes: dict[str, Any]) -> None:
    wishes["prefill_graph_tokens"] = 64
    assert settled().device.prefill_graph_tokens == 64
    assert settled(deterministic=True).device.prefill_graph_tokens == 0
    assert settled(deterministic=True, prefill_graph_tokens=0).device.prefill_graph_tokens == 0
    with pytest.raises(ConfigError, match="prefill_graph_tokens=32 with --deterministic"):
        settled(deterministic=True, prefill_graph_tokens=32)


def test_a_backend_cannot_invent_settings(wishes: dict[str, Any]) -> None:
    wishes["warp_speed"] = 9
    with pytest.raises(PluginError, match="'cpu' sets defaults for warp_speed"):
        settled()


def test_the_context_is_the_models_unless_asked_for_less() -> None:
    base = {"model_path": "demo", "device": "cpu"}
    assert resolve(EngineConfig.from_flat(**base)).context_length == 2048
    asked = resolve(EngineConfig.from_flat(**base, context_length=100))
    assert asked.context_length == 100 and asked.context_asked


def test_no_model_path_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match="'demo' for the embedded demo model"):
        settled(model_path="")


def test_experts_that_cannot_be_dealt_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ep_size=2: Qwen3ForCausalLM has no experts to deal; drop --ep-size"):
        settled(ep_size=2, tp_size=2)
    config = json.loads((demo.path() / "config.json").read_text())
    experts = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | experts | {"architectures": ["Qwen3MoeForCausalLM"]}))
    dummy = {"model_path": str(tmp_path), "load_format": "dummy"}
    with pytest.raises(
        ConfigError, match=r"ep_size=4 does not divide tp_size=4 and the 6 experts; set --ep-size to 1 or 2"
    ):
        settled(**dummy, ep_size=4, tp_size=4)
    assert settled(**dummy, ep_size=2, tp_size=4).parallel.ep_size == 2


def test_a_plugin_brings_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((demo.path() / "config.json").read_text()) | {"architectures": ["AcmeForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))

    class Named:
        def named(self, hook: str) -> dict[str, str]:
            assert hook == "sglang_models"
            return {"AcmeForCausalLM": "sglang_core.models.llama:LlamaForCausalLM"}

    with pytest.raises(ConfigError, match="AcmeForCausalLM"):
        resolve(EngineConfig.from_flat(model_path=str(tmp_path), device="cpu"))
    monkeypatch.setattr(resolving, "Providers", Named)
    assert resolve(EngineConfig.from_flat(model_path=str(tmp_path), device="cpu")).model_class is LlamaForCausalLM
