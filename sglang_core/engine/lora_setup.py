"""What the LoRA settings come to: the room that layers keep, and the adapters that are there from the start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sglang_core.config import LoraArgs
from sglang_core.engine.adapter_names import parse_lora_paths
from sglang_core.errors import ConfigError
from sglang_core.layers.lora import LoraSpec
from sglang_core.types import AdapterSource
from sglang_core.weights.adapter import inspect_adapter, lora_spec


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSetup:
    """Settled before a model is built. `sources` by name."""

    spec: LoraSpec
    sources: Mapping[str, AdapterSource]
    max_loaded: int | None


def lora_setup(args: LoraArgs) -> LoraSetup | None:
    """None where LoRA is not asked for. Reads the adapters' configs and headers. Raises ConfigError, WeightError."""
    sources = {source.name: source for source in parse_lora_paths(args.lora_paths)}
    if not (args.enable_lora or sources):
        return None
    if args.max_loaded_loras is not None:
        least = max(args.max_loras_per_batch, len(sources))
        if args.max_loaded_loras < least:
            raise ConfigError(
                f"max_loaded_loras={args.max_loaded_loras} must be at least {least}: the larger of --max-loras-per-batch "
                f"({args.max_loras_per_batch}) and the number of --lora-paths ({len(sources)})"
            )
    spec = lora_spec(
        [inspect_adapter(source.path) for source in sources.values()],
        num_slots=args.max_loras_per_batch,
        max_rank=args.max_lora_rank,
        targets=args.lora_target_modules,
    )
    return LoraSetup(spec=spec, sources=sources, max_loaded=args.max_loaded_loras)
