"""`KVScheme`: what a checkpoint's `quantization_config` says about cached keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

FP8_SCHEME = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class KVScheme:
    """Keys and values were calibrated for fp8, with static scales for each `scales`: one a layer, or one a KV head.

    `problem` says what of a scheme is not supported; it matters only where --kv-cache-dtype leaves the choice to the checkpoint.
    """

    scales: Literal["tensor", "head"] = "tensor"
    problem: str = ""


def read_kv_scheme(raw: Mapping[str, Any]) -> KVScheme | None:
    """`kv_cache_scheme` of compressed-tensors, modelopt and AutoFP8, else `kv_cache_quant_algo` of modelopt; None without."""
    scheme, algorithm = raw.get("kv_cache_scheme"), raw.get("kv_cache_quant_algo")
    if scheme is None:
        if algorithm in (None, "FP8"):
            return None if algorithm is None else KVScheme()
        return KVScheme(problem=f"kv_cache_quant_algo={algorithm!r} is not FP8")
    if scheme == "static":
        return KVScheme()
    if not isinstance(scheme, Mapping):
        return KVScheme(problem=f"kv_cache_scheme={scheme!r} is neither 'static' nor an object")
    odd = [f"{key}={scheme[key]!r}" for key, value in FP8_SCHEME.items() if scheme.get(key, value) != value]
    if scheme.get("strategy", "tensor") not in ("tensor", "attn_head"):
        odd.append(f"strategy={scheme['strategy']!r}")
    if odd:
        return KVScheme(problem=f"kv_cache_scheme has {', '.join(odd)}; known is static fp8, a tensor or a head")
    return KVScheme(scales="head" if scheme.get("strategy") == "attn_head" else "tensor")
