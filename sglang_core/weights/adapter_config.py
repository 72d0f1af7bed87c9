"""PEFT's adapter_config.json: what of it says how to compute, and what is refused because it computes otherwise."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sglang_core.errors import WeightError

# Variants of LoRA that add other terms than scale * B A x, and what their settings say when they are off.
VARIANTS: Mapping[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "lora_bias": "a bias on B",
    "modules_to_save": "whole modules trained beside the adapter",
    "target_parameters": "adapters on parameters rather than modules",
    "trainable_token_indices": "retrained tokens",
    "layer_replication": "replicated layers",
    "fan_in_fan_out": "transposed weights",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """Rank and scaling of an adapter. A pattern is PEFT's: a regular expression that the end of a module's name must match."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_rank_stabilized: bool  # rsLoRA (arXiv:2312.03732): divides by the root of the rank

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str) -> AdapterConfig:
        """Raises WeightError, with what was found and the way out, for what is no LoRA adapter or a variant of it."""
        if (kind := raw.get("peft_type", "LORA")) != "LORA":
            raise WeightError(f"{where}: peft_type={kind!r} is not supported; only LORA adapters are")
        if (bias := raw.get("bias", "none")) != "none":
            raise WeightError(f"{where}: bias={bias!r}: trained biases are not supported; train with bias='none'")
        for name, what in VARIANTS.items():
            if raw.get(name):
                raise WeightError(
                    f"{where}: {name}={raw[name]!r} means {what}, which is not supported; train without it, or merge the adapter "
                    "into the model with PEFT's merge_and_unload"
                )
        rank, alpha = raw.get("r"), raw.get("lora_alpha")
        if type(rank) is not int or rank < 1:
            raise WeightError(f"{where}: r={rank!r} must be a rank of at least 1")
        if alpha is None or not _is_number(alpha):
            raise WeightError(f"{where}: lora_alpha={alpha!r} must be a number")
        ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
        for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            if not isinstance(pattern, dict) or not all(_is_number(value) for value in pattern.values()):
                raise WeightError(f"{where}: {name}={pattern!r} must map names of modules to numbers")
            for key in pattern:
                _compiled(key, f"{where}: {name}")
        if any(type(value) is not int or value < 1 for value in ranks.values()):
            raise WeightError(f"{where}: rank_pattern={ranks!r} must hold ranks of at least 1")
        return cls(
            rank=rank,
            alpha=float(alpha),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            is_rank_stabilized=bool(raw.get("use_rslora")),
        )

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What B A x is multiplied by."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return float(alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank))


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Of the first pattern that matches the end of the name, from a dot on; the default if none does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _compiled(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as e:
        raise WeightError(f"{where}: {pattern!r} is no regular expression: {e}") from e


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
