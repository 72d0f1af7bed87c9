"""Rotary position embedding: what a checkpoint asks for (`RopeSpec`), its table of cosines and sines, and the rotation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sglang_core.errors import ConfigError
from sglang_core.ops.registry import op
from sglang_core.ops.rounding import wide

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
DEFAULT_THETA = 10000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """How positions turn into rotations. Hashable. Fields after `kind` belong to the kinds named beside them."""

    head_dim: int
    rotary_dim: int  # the first rotary_dim dims of a head are rotated, the rest pass
    theta: float = DEFAULT_THETA
    style: Literal["neox", "interleaved"] = "neox"  # pairs (j, j + rotary_dim / 2) or (2j, 2j + 1)
    max_position: int = 0  # the checkpoint's max_position_embeddings
    kind: str = "default"
    factor: float = 1.0  # linear, dynamic, llama3, yarn
    original_max_position: int = 0  # llama3, yarn, longrope: context length before stretching
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dims
    short_factor: tuple[float, ...] = ()  # longrope, [rotary_dim / 2]
    long_factor: tuple[float, ...] = ()  # longrope
    attention_factor: float = 1.0  # yarn, longrope: multiplies cosines and sines

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        head_dim: int | None = None,
        layer_type: str | None = None,
        style: Literal["neox", "interleaved"] = "neox",
    ) -> RopeSpec:
        """Read a checkpoint's config.json: `rope_parameters` (maybe one a layer type), or `rope_theta` and `rope_scaling`.

        Raises ConfigError on a kind that is not in ROPE_KINDS.
        """
        params = _parameters(config, layer_type)
        kind = params.get("rope_type") or params.get("type") or "default"
        kind = "longrope" if kind == "su" else kind
        if kind not in ROPE_KINDS:
            raise ConfigError(f"rope_type={kind!r} is not supported (there are {', '.join(ROPE_KINDS)})")
        head_dim = head_dim or config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        max_position = int(config.get("max_position_embeddings") or 0)
        original = int(
            config.get("original_max_position_embeddings")
            or params.get("original_max_position_embeddings")
            or max_position
        )
        factor = params.get("factor") or (max_position / original if kind in ("yarn", "longrope") else 1.0)
        return cls(
            head_dim=head_dim,
            rotary_dim=int(head_dim * params.get("partial_rotary_factor", 1.0)),
            theta=float(params["rope_theta"]),
            style=style,
            max_position=max_position,
            kind=kind,
            factor=float(factor),
            original_max_position=original,
            low_freq_factor=float(params.get("low_freq_factor", 1.0)),
            high_freq_factor=float(params.get("high_freq_factor", 4.0)),
            beta_fast=float(params.get("beta_fast") or 32),
            beta_slow=float(params.get("beta_slow") or 1),
            truncate=bool(params.get("truncate", True)),
            short_factor=tuple(params.get("short_factor", ())),
            long_factor=tuple(params.get("long_factor", ())),
            attention_factor=_attention_factor(kind, params, factor, original),
        )


def rope_table(spec: RopeSpec, context_length: int, device: torch.device | None = None) -> Tensor:
    """float32 [context_length, rotary_dim]: the cosines of each position's angles, then the sines. Computed on the host.

    float32 throughout, as checkpoints were trained. Kinds that depend on the length of the text take the length the engine is
    configured for, for every req: `dynamic` stretches its base for context_length, `longrope` uses its long factors where
    context_length exceeds original_max_position. So a req's cached keys never change their meaning as it grows.
    """
    positions = torch.arange(context_length, dtype=torch.float32, device="cpu")
    angles = positions[:, None] * inverse_frequencies(spec, context_length)
    table = torch.cat([angles.cos(), angles.sin()], dim=1) * spec.attention_factor
    return table.to(device or "cpu")


def inverse_frequencies(spec: RopeSpec, context_length: int) -> Tensor:
    """float32 [rotary_dim / 2] on the host: radians a position."""
    dim, theta = spec.rotary_dim, spec.theta
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    if spec.kind == "dynamic":
        length = max(context_length, spec.max_position)
        theta *= (spec.factor * length / spec.max_position - (spec.factor - 1)) ** (dim / (dim - 2))
    if spec.kind == "longrope":
        stretch = spec.long_factor if context_length > spec.original_max_position else spec.short_factor
        return 1.0 / (torch.tensor(stretch, dtype=torch.float32, device="cpu") * theta**exponents)
    freqs = 1.0 / theta**exponents
    if spec.kind == "linear":
        return freqs / spec.factor
    if spec.kind == "llama3":
        # Turns over the original context: few are stretched by factor, many are kept, between them both are mixed.
        turns = spec.original_max_position * freqs / (2 * math.pi)
        keep = ((turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)).clamp(0, 1)
        return freqs * keep + freqs / spec.factor * (1 - keep)
    if spec.kind == "yarn":
        stretched = _yarn_ramp(spec)
        return freqs / spec.factor * stretched + freqs * (1 - stretched)
    return freqs


@op("rope.apply")
def rope_apply(q: Tensor, k: Tensor, positions: Tensor, table: Tensor, spec: RopeSpec) -> tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [T, Hk, D], positions: int32[T], table: float32[L, rotary_dim] -> q, k rotated, as they are shaped.

    Row p of the table has the cosines of position p's angles and then the sines. Angle j turns a pair of the first rotary_dim
    dims of a head: (j, j + rotary_dim / 2) in style "neox", (2j, 2j + 1) in style "interleaved". The other dims pass, bit for bit.
    float32 inside, one rounding to the input's dtype at the end.
    """
    cos, sin = table[positions][:, None].chunk(2, dim=-1)
    return _rotate(q, cos, sin, spec), _rotate(k, cos, sin, spec)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, spec: RopeSpec) -> Tensor:
    turned, rest = x[..., : spec.rotary_dim], x[..., spec.rotary_dim :]
    y = wide(turned)
    cos, sin = cos.to(y.dtype), sin.to(y.dtype)
    if spec.style == "neox":
        a, b = y.chunk(2, dim=-1)
        y = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        a, b = y[..., 0::2], y[..., 1::2]
        y = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    y = y.to(x.dtype)
    return y if spec.rotary_dim == spec.head_dim else torch.cat([y, rest], dim=-1)


def _parameters(config: Mapping[str, Any], layer_type: str | None) -> dict[str, Any]:
    """One flat dict of rope parameters, with rope_theta, whatever generation of config.json this is."""
    params = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if layer_type is not None and isinstance(params.get(layer_type), Mapping):
        params = params[layer_type]
    elif layer_type == "sliding_attention" and config.get("rope_local_base_freq"):
        params = {"rope_theta": config["rope_local_base_freq"]}  # Gemma 3 before transformers 5
    defaults = {"rope_theta": config.get("rope_theta") or DEFAULT_THETA}
    if config.get("partial_rotary_factor"):
        defaults["partial_rotary_factor"] = config["partial_rotary_factor"]
    return defaults | {name: value for name, value in params.items() if value is not None}


def _attention_factor(kind: str, params: Mapping[str, Any], factor: float, original: int) -> float:
    if kind not in ("yarn", "longrope"):
        return 1.0
    if (given := params.get("attention_factor")) is not None:
        return float(given)
    if factor <= 1.0:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    mscale, all_dim = params.get("mscale"), params.get("mscale_all_dim")
    if mscale and all_dim:
        return float((0.1 * mscale * math.log(factor) + 1.0) / (0.1 * all_dim * math.log(factor) + 1.0))
    return 0.1 * math.log(factor) + 1.0


def _yarn_ramp(spec: RopeSpec) -> Tensor:
    """float32 [rotary_dim / 2], 0 where a dim turns often enough to be kept, 1 where it is stretched by the whole factor."""

    def dim_that_turns(times: float) -> float:
        wavelength = spec.original_max_position / (times * 2 * math.pi)
        return spec.rotary_dim * math.log(wavelength) / (2 * math.log(spec.theta))

    low, high = dim_that_turns(spec.beta_fast), dim_that_turns(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    dims = torch.arange(spec.rotary_dim // 2, dtype=torch.float32, device="cpu")
    return ((dims - low) / max(high - low, 0.001)).clamp(0, 1)
