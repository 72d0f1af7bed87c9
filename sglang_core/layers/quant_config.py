"""`QuantConfig`: a checkpoint's `quantization_config`, as the stored format of each linear layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from sglang_core.errors import ConfigError
from sglang_core.layers.stored import Layout, Stored
from sglang_core.ops.formats import Fmt

METHODS = (
    "fp8, compressed-tensors (fp8, int8 w8a8, 4-bit pack-quantized, nvfp4), awq (gemm), gptq, modelopt (FP8, NVFP4)"
)
_PLAIN = {"weight": "weight", "scale": "weight_scale", "x_scale": "input_scale"}
_NVFP4 = {"weight": "weight_packed", "global_scale": "weight_global_scale", "x_scale": "input_global_scale"}
_MODELOPT4 = {"global_scale": "weight_scale_2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """Every linear layer is `stored`, but those that `ignored` names: a name, a part of a dotted one, a glob, or "re:...".

    `unread` are suffixes of tensors that such checkpoints have and that say nothing new.
    """

    method: str
    stored: Stored
    ignored: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    def layer(self, name: str) -> Stored | None:
        """None where it is dense; `name` is the checkpoint's, without ".weight"."""
        return None if any(_names(pattern, name) for pattern in self.ignored) else self.stored


def read_quant_config(raw: Mapping[str, Any]) -> QuantConfig:
    """Raises ConfigError, with what was found and what is known, on a scheme that is not read completely."""
    method = str(raw.get("quant_method", "?"))
    match method:
        case "fp8":
            return _fp8(raw)
        case "awq":
            return _awq(raw)
        case "gptq":
            return _gptq(raw)
        case "compressed-tensors":
            return _compressed_tensors(raw)
        case "modelopt" | "modelopt_fp4":
            return _modelopt(raw)
    raise _refused(raw, f"quant_method={method!r} is not read")


def _fp8(raw: Mapping[str, Any]) -> QuantConfig:
    _only(raw, {"fmt": (None, "e4m3"), "activation_scheme": ("static", "dynamic")})
    block, static = raw.get("weight_block_size"), raw.get("activation_scheme") == "static"
    ignored = _names_in(raw, "modules_to_not_convert", "ignored_layers")
    if block is None:
        return _config(raw, "fp8.tensor.static" if static else "fp8.tensor", ignored=ignored)
    if list(block) != [128, 128] or static:
        raise _refused(raw, f"weight_block_size={block}, activation_scheme={raw.get('activation_scheme')!r}")
    return _config(raw, "fp8.block128", {"scale": "weight_scale_inv"}, ignored=ignored)


def _awq(raw: Mapping[str, Any]) -> QuantConfig:
    _only(raw, {"bits": (4,), "version": ("gemm", "GEMM"), "zero_point": (True,)})
    group = _group(raw, raw.get("group_size", raw.get("q_group_size")))
    return _config(raw, f"int4.awq.g{group}", layout="awq", ignored=_names_in(raw, "modules_to_not_convert"))


def _gptq(raw: Mapping[str, Any]) -> QuantConfig:
    known = {"bits": (4,), "desc_act": (True, False), "checkpoint_format": (None, "gptq", "gptq_v2")}
    nothing: tuple[object, ...] = (None, False, {}, [])
    _only(raw, known | {"lm_head": nothing, "dynamic": nothing, "modules_in_block_to_quantize": nothing})
    order = bool(raw["desc_act"])
    fmt = f"int4.gptq.g{_group(raw, raw.get('group_size'))}" + (".act_order" if order else "")
    layout: Layout = "gptq_v2" if raw.get("checkpoint_format") == "gptq_v2" else "gptq"
    return _config(raw, fmt, layout=layout, unread=() if order else (".g_idx",))


def _compressed_tensors(raw: Mapping[str, Any]) -> QuantConfig:
    _only(raw, {"kv_cache_scheme": (None,), "quantization_status": (None, "compressed")})
    groups = list((raw.get("config_groups") or {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"] or groups[0].get("output_activations"):
        raise _refused(raw, "config_groups is not one group that targets Linear")
    if raw.get("sparsity_config") not in (None, {}) or raw.get("transform_config") not in (None, {}):
        raise _refused(raw, "it has sparsity or transforms")
    w, x = groups[0].get("weights") or {}, groups[0].get("input_activations")
    ignored = _names_in(raw, "ignore")
    scheme = (w.get("num_bits"), w.get("type"), w.get("strategy"), bool(w.get("symmetric")))
    dynamic = None if x is None else (x.get("num_bits"), x.get("type"), x.get("strategy"), x.get("dynamic"))
    match scheme, dynamic:
        case (8, "int", "channel", True), (8, "int", "token", True):
            asym = "" if x and x.get("symmetric") else ".asym"
            return _config(raw, f"int8.token_channel{asym}", ignored=ignored)
        case (8, "float", "channel", True), (8, "float", "token", True):
            return _config(raw, "fp8.token_channel", ignored=ignored)
        case (8, "float", "tensor", True), (8, "float", "token" | "tensor", True):
            return _config(raw, "fp8.tensor", ignored=ignored)
        case (8, "float", "tensor", True), (8, "float", "tensor", False):
            return _config(raw, "fp8.tensor.static", ignored=ignored)
        case (8, "float", "block", True), (8, "float", "group", True) if (
            w.get("block_structure") == [128, 128] and x and x.get("group_size") == 128
        ):
            return _config(raw, "fp8.block128", ignored=ignored)
        case (4, "int", "group" | "channel", True), None if w.get("actorder") in (None, False, "weight", "static"):
            group = -1 if w["strategy"] == "channel" else _group(raw, w.get("group_size"))
            return _config(raw, f"int4.pack.g{group}", layout="pack", ignored=ignored, unread=(".weight_shape",))
        case (4, "float", "tensor_group", True), _ if w.get("group_size") == 16:
            if x is not None and (x.get("num_bits"), x.get("type"), x.get("group_size")) != (4, "float", 16):
                raise _refused(raw, f"input_activations={x}")
            fmt = "nvfp4.g16.a16" if x is None else "nvfp4.g16.static"
            return _config(raw, fmt, _NVFP4, layout="nvfp4", inverse=True, ignored=ignored)
    raise _refused(raw, f"weights={w}, input_activations={x}")


def _modelopt(raw: Mapping[str, Any]) -> QuantConfig:
    _only(raw, {"kv_cache_scheme": (None,), "kv_cache_quant_algo": (None,)})
    ignored = _names_in(raw, "ignore", "exclude_modules")
    if raw.get("quant_algo") == "FP8":
        return _config(raw, "fp8.tensor.static", ignored=ignored)
    if raw.get("quant_algo") == "NVFP4" and raw.get("group_size", 16) == 16:
        return _config(raw, "nvfp4.g16.static", _MODELOPT4, layout="nvfp4", ignored=ignored)
    raise _refused(raw, f"quant_algo={raw.get('quant_algo')!r}")


def _config(
    raw: Mapping[str, Any],
    fmt: str,
    names: Mapping[str, str] | None = None,
    *,
    layout: Layout = "plain",
    inverse: bool = False,
    ignored: tuple[str, ...] = (),
    unread: tuple[str, ...] = (),
) -> QuantConfig:
    stored = Stored(fmt=Fmt.parse(fmt), layout=layout, names={**_PLAIN, **(names or {})}, inverse=inverse)
    return QuantConfig(method=str(raw["quant_method"]), stored=stored, ignored=ignored, unread=unread)


def _names(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch(name, pattern) if "*" in pattern else f".{pattern}." in f".{name}."


def _names_in(raw: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    return tuple(name for key in keys for name in raw.get(key) or ())


def _group(raw: Mapping[str, Any], size: object) -> int:
    if size not in (32, 64, 128, -1):
        raise _refused(raw, f"group_size={size!r} is none of 32, 64, 128, -1")
    return int(str(size))


def _only(raw: Mapping[str, Any], known: Mapping[str, tuple[object, ...]]) -> None:
    for key, values in known.items():
        if raw.get(key) not in values:
            raise _refused(raw, f"{key}={raw.get(key)!r} is none of {', '.join(map(repr, values))}")


def _refused(raw: Mapping[str, Any], why: str) -> ConfigError:
    return ConfigError(
        f"the checkpoint is quantised ({raw.get('quant_method', '?')}) in a way that is not supported: {why}. Known are "
        f"{METHODS}; or use its bfloat16 or float16 version"
    )
