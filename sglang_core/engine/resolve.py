"""Settling every "auto" of a config, once, before anything is built: which device, dtype, context, page size and limits."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sglang_core.backend.devices import ChosenDevice, open_device
from sglang_core.backend.interface import DefaultsContext
from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.backend.providers import Providers
from sglang_core.config import EngineConfig, ParallelArgs, all_settings
from sglang_core.engine.lora_setup import LoraSetup, lora_setup
from sglang_core.errors import ConfigError, PluginError
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.kv_scheme import KVScheme
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.quant_config import online_quant_config
from sglang_core.models.registry import model_class
from sglang_core.parallel.groups import shard_experts
from sglang_core.scheduler.config import SchedulerConfig
from sglang_core.weights.checkpoint import read_config, resolve_folder

log = logging.getLogger(__name__)
T = TypeVar("T")

# What is taken where neither the user nor the backend says anything.
GENERIC_DEFAULTS: Mapping[str, Any] = {
    "page_size": 16,
    "chunked_prefill_size": 2048,
    "max_running_requests": 256,
    "max_queued_requests": 4096,
    "mem_fraction_static": 0.8,
    "prefill_graph_tokens": 0,
}
UNLIMITED_CHUNK = -1
KV_ALIASES = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A config without autos (but the pool size, which needs the opened device), and what was read to settle it."""

    config: EngineConfig
    device: ChosenDevice
    folder: Path
    hf_config: Mapping[str, Any]
    model_class: type[CausalLM]
    model: ModelConfig
    context_length: int
    context_asked: bool  # by the user
    served_model_name: str
    lora: LoraSetup | None

    @property
    def page_size(self) -> int:
        return required(self.config.cache.page_size)


def resolve(config: EngineConfig, device: ChosenDevice | None = None) -> Resolved:
    """`device` stands for the config's, where it is open already.

    Raises ConfigError, DeviceError, PluginError or WeightError with the way out.
    """
    if not config.model.model_path:
        raise ConfigError("model_path is missing; give a local folder, a hub id, or 'demo' for the embedded demo model")
    device = device or open_device(config.device.device)
    log.info("device %s (%s): %s", device.info.label, device.info.path, device.reason)
    with_weights = config.model.load_format != "dummy"
    folder = resolve_folder(config.model.model_path, config.model.revision, weights=with_weights)
    hf_config = read_config(folder)
    from_plugins = Providers().named("sglang_models")
    cls = model_class(hf_config, trust_remote_code=config.model.trust_remote_code, extra=from_plugins)
    model = cls.read_config(hf_config)
    _check_experts(config.parallel, model)
    wanted = config.model
    quantization = online_quant_config(wanted.quantization, model.quantization, head=wanted.quantize_lm_head)
    model = model.replace(quantization=quantization)
    settled = _with_defaults(_without_prefill_graphs(config), device, hf_config)
    if settled.model.dtype == "auto":
        settled = _replace(settled, dtype=model.dtype)
    settled = _replace(settled, kv_cache_dtype=_kv_cache_dtype(settled, model.kv_scheme))
    return Resolved(
        config=settled,
        device=device,
        folder=folder,
        hf_config=hf_config,
        model_class=cls,
        model=model,
        context_asked=settled.model.context_length is not None,
        context_length=_context_length(settled, model),
        served_model_name=settled.model.served_model_name or settled.model.model_path,
        lora=lora_setup(settled.lora),
    )


def scheduler_config(resolved: Resolved) -> SchedulerConfig:
    settled = resolved.config
    chunk = required(settled.schedule.chunked_prefill_size)
    return SchedulerConfig(
        max_running=required(settled.schedule.max_running_requests),
        max_queued=settled.schedule.max_queued_requests,
        context_length=resolved.context_length,
        page_size=resolved.page_size,
        token_budget=resolved.context_length if chunk == UNLIMITED_CHUNK else chunk,
        chunked=chunk != UNLIMITED_CHUNK,
        policy=settled.schedule.schedule_policy,
        max_in_flight=1 if settled.schedule.disable_overlap_schedule else 2,
        random_seed=settled.schedule.random_seed,
        num_adapter_slots=0 if resolved.lora is None else resolved.lora.spec.num_slots,
    )


def required(value: T | None) -> T:
    """A setting that `resolve` has settled."""
    assert value is not None, "resolve() settles every auto"
    return value


def _check_experts(parallel: ParallelArgs, model: ModelConfig) -> None:
    """Raises ConfigError for experts that cannot be dealt as asked, before anything is opened or loaded."""
    if parallel.ep_size == 1:
        return
    if model.moe is None:
        raise ConfigError(f"ep_size={parallel.ep_size}: {model.architecture} has no experts to deal; drop --ep-size")
    shard_experts(model.moe.route.num_experts, parallel.ep_size, 0, parallel.tp_size)


def _with_defaults(config: EngineConfig, device: ChosenDevice, hf_config: Mapping[str, Any]) -> EngineConfig:
    """Fill what is None (or dtype "auto") from the backend, then from the generic defaults; the user always wins."""
    backend = device.backend
    wished = backend.config_defaults(DefaultsContext(device=device.info, model=dict(hf_config)))
    known = {f.name for _, f in all_settings()}
    if unknown := sorted(set(wished) - known):
        raise PluginError(f"backend {backend.name!r} sets defaults for {', '.join(unknown)}, which are no settings")
    given = config.flat()
    filled = {}
    for name, value in {**GENERIC_DEFAULTS, **wished}.items():
        if given[name] is None or (name == "dtype" and given[name] == "auto"):
            filled[name] = value
            if name in wished:
                log.info("%s=%s, the default of backend %r", name, value, backend.name)
    return _replace(config, **filled)


def _without_prefill_graphs(config: EngineConfig) -> EngineConfig:
    """Where results may not depend on neighbours: a bucket has one form of latent attention and of recurrent ops, a longer step another."""
    if not config.device.deterministic:
        return config
    if config.device.prefill_graph_tokens:
        raise ConfigError(
            f"prefill_graph_tokens={config.device.prefill_graph_tokens} with --deterministic: a graph and a step of its own shape may"
            " round differently, and which one a request gets depends on the others; leave one of them out"
        )
    return _replace(config, prefill_graph_tokens=0)


def _kv_cache_dtype(config: EngineConfig, scheme: KVScheme | None) -> str:
    asked = config.cache.kv_cache_dtype
    if asked != "auto":
        return KV_ALIASES.get(asked, asked)
    if scheme is None:
        return config.model.dtype
    if scheme.problem:
        raise ConfigError(
            f"the checkpoint's cached keys and values are quantised in a way that is not supported: {scheme.problem}; "
            f"set --kv-cache-dtype to one of {', '.join(KV_DTYPES)}"
        )
    return "fp8_e4m3"


def _context_length(config: EngineConfig, model: ModelConfig) -> int:
    asked = config.model.context_length
    if asked is None:
        return model.max_position
    if asked > model.max_position:
        raise ConfigError(
            f"context_length={asked} is beyond the model's {model.max_position} positions; set --context-length {model.max_position}"
            " or less, or extend the model's rope scaling in its config.json"
        )
    return asked


def _replace(config: EngineConfig, **settings: Any) -> EngineConfig:
    return EngineConfig.from_flat(**{**config.flat(), **settings})
