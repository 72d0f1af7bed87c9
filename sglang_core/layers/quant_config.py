"""`QuantConfig`: a checkpoint's `quantization_config`, as the stored format of each linear layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from sglang_core.errors import ConfigError
from sglang_core.layers.stored import DENSE, Layout, Stored
from sglang_core.ops.formats import Fmt

METHODS = (
    "fp8, compressed-tensors (fp8, int8 w8a8, 4-bit pack-quantized, nvfp4), awq (gemm), gptq, modelopt (FP8, NVFP4, "
    "MIXED_PRECISION of these), mxfp4 (stacked experts)"
)
ONLINE: Mapping[str, str] = {  # --quantization of a checkpoint that is not quantised; w8a8_* are SGLang's names
    "fp8": "fp8.token_channel",
    "w8a8_fp8": "fp8.token_channel",
    "int8": "int8.token_channel",
    "w8a8_int8": "int8.token_channel",
    "int4": "int4.pack.g128",
}
SAME: Mapping[str, str] = {  # SGLang's names of a method with one of its kernels -> the checkpoint's
    "awq_marlin": "awq",
    "gptq_marlin": "gptq",
    "modelopt_fp8": "modelopt",
    "modelopt_fp4": "modelopt",
}
_PLAIN = {"weight": "weight", "scale": "weight_scale", "x_scale": "input_scale"}
_NVFP4 = {"weight": "weight_packed", "global_scale": "weight_global_scale", "x_scale": "input_global_scale"}
_MODELOPT4 = {"global_scale": "weight_scale_2"}
_EVERY = ("*",)
_INT4_LAYOUTS: Mapping[str, Layout] = {  # by compressed-tensors' `format`
    "pack-quantized": "pack",
    "int-quantized": "codes8",
    "naive-quantized": "codes8",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Layers stored alike: each of `targets` is a name, a part of a dotted one, a glob, or "re:..."; `names` are whole names."""

    stored: Stored
    targets: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()

    def covers(self, name: str) -> bool:
        return name in self.names or any(_names(target, name) for target in self.targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """How linear layers and experts are stored: as the first of `rules` that covers them says, unless one of `ignored` does.

    `unread` are suffixes of tensors that such checkpoints have and that say nothing new.
    """

    method: str
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    head: Stored = DENSE  # of the language-model head

    def layer(self, name: str) -> Stored:
        """`name` is the checkpoint's, without ".weight". A layer that nothing covers is dense."""
        if any(_names(pattern, name) for pattern in self.ignored):
            return DENSE
        return next((rule.stored for rule in self.rules if rule.covers(name)), DENSE)


def online_quant_config(flag: str | None, found: QuantConfig | None, *, head: bool = False) -> QuantConfig | None:
    """What `--quantization` asks for, of a checkpoint that is quantised as `found`, or not at all; with `head`, of its head too.

    The name of what a checkpoint is already changes nothing. Raises ConfigError on anything else for a quantised checkpoint,
    on a format that is not made while loading, and on a `head` where nothing else is quantised while loading.
    """
    if head and (flag is None or found is not None):
        raise ConfigError(
            "quantize_lm_head goes with --quantization of a checkpoint that is not quantised; drop it, or take a checkpoint in "
            "bfloat16 and --quantization fp8, int8 or int4"
        )
    if flag is None:
        return found
    if found is not None:
        if SAME.get(flag, flag) == found.method or {rule.stored.fmt.name for rule in found.rules} == {ONLINE.get(flag)}:
            return found
        raise ConfigError(
            f"quantization={flag!r}, but the checkpoint is quantised already ({found.method}); drop --quantization, or take "
            "its bfloat16 version"
        )
    if flag not in ONLINE:
        raise ConfigError(
            f"quantization={flag!r} is not made while loading a checkpoint that is not quantised (there are "
            f"{', '.join(ONLINE)}); take a checkpoint that was quantised so"
        )
    stored = Stored(fmt=Fmt.parse(ONLINE[flag]), layout="dense")
    return QuantConfig(method=flag, rules=(Rule(stored=stored, targets=_EVERY),), head=stored if head else DENSE)


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
        case "mxfp4":
            return _mxfp4(raw)
    raise _refused(raw, f"quant_method={method!r} is not read")


def _fp8(raw: Mapping[str, Any]) -> QuantConfig:
    _only(raw, {"fmt": (None, "e4m3"), "activation_scheme": ("static", "dynamic")})
    block, static = raw.get("weight_block_size"), raw.get("activation_scheme") == "static"
    ignored = _names_in(raw, "modules_to_not_convert", "ignored_layers")
    if block is None:
        return _config(raw, _stored("fp8.tensor.static" if static else "fp8.tensor"), ignored=ignored)
    if list(block) != [128, 128] or static:
        raise _refused(raw, f"weight_block_size={block}, activation_scheme={raw.get('activation_scheme')!r}")
    return _config(raw, _stored("fp8.block128", {"scale": "weight_scale_inv"}), ignored=ignored)


def _awq(raw: Mapping[str, Any]) -> QuantConfig:
    _only(raw, {"bits": (4,), "version": ("gemm", "GEMM"), "zero_point": (True,)})
    group = _group(raw, raw.get("group_size", raw.get("q_group_size")))
    stored = _stored(f"int4.awq.g{group}", layout="awq")
    return _config(raw, stored, ignored=_names_in(raw, "modules_to_not_convert"))


def _gptq(raw: Mapping[str, Any]) -> QuantConfig:
    known = {"bits": (4,), "desc_act": (True, False), "checkpoint_format": (None, "gptq", "gptq_v2")}
    nothing: tuple[object, ...] = (None, False, {}, [])
    _only(raw, known | {"lm_head": nothing, "dynamic": nothing, "modules_in_block_to_quantize": nothing})
    order = bool(raw["desc_act"])
    fmt = f"int4.gptq.g{_group(raw, raw.get('group_size'))}" + (".act_order" if order else "")
    layout: Layout = "gptq_v2" if raw.get("checkpoint_format") == "gptq_v2" else "gptq"
    return _config(raw, _stored(fmt, layout=layout), unread=() if order else (".g_idx",))


def _mxfp4(raw: Mapping[str, Any]) -> QuantConfig:
    """GPT-OSS: every stack of experts, and nothing else."""
    return QuantConfig(
        method="mxfp4",
        rules=(Rule(stored=_stored("mxfp4.g32", layout="mxfp4"), targets=("*.experts",)),),
        ignored=_names_in(raw, "modules_to_not_convert"),
    )


def _compressed_tensors(raw: Mapping[str, Any]) -> QuantConfig:
    _only(raw, {"quantization_status": (None, "compressed")})
    groups = list((raw.get("config_groups") or {}).values())
    if not groups and raw.get("kv_cache_scheme") is None:
        raise _refused(raw, "config_groups is missing or empty")
    if raw.get("sparsity_config") not in (None, {}) or raw.get("transform_config") not in (None, {}):
        raise _refused(raw, "it has sparsity or transforms")
    rules = [_group_rule(raw, group) for group in groups]
    rules.sort(key=lambda rule: rule.targets == _EVERY)  # a name says more than the class
    packed = any(rule.stored.layout == "pack" for rule in rules)
    return QuantConfig(
        method="compressed-tensors",
        rules=tuple(rules),
        ignored=_names_in(raw, "ignore"),
        unread=(".weight_shape",) if packed else (),
    )


def _group_rule(raw: Mapping[str, Any], group: Mapping[str, Any]) -> Rule:
    targets = tuple(group.get("targets") or ())
    if not targets or group.get("output_activations"):
        raise _refused(raw, f"targets={list(targets)}, output_activations={group.get('output_activations')}")
    w, x = group.get("weights") or {}, group.get("input_activations")
    form = group.get("format") or raw.get("format") or "pack-quantized"
    return Rule(stored=_scheme(raw, w, x, form), targets=_EVERY if "Linear" in targets else targets)


def _scheme(raw: Mapping[str, Any], w: Mapping[str, Any], x: Mapping[str, Any] | None, form: object) -> Stored:
    scheme = (w.get("num_bits"), w.get("type"), w.get("strategy"), bool(w.get("symmetric")))
    dynamic = None if x is None else (x.get("num_bits"), x.get("type"), x.get("strategy"), x.get("dynamic"))
    match scheme, dynamic:
        case (8, "int", "channel", True), (8, "int", "token", True):
            return _stored("int8.token_channel" + ("" if x and x.get("symmetric") else ".asym"))
        case (8, "float", "channel", True), (8, "float", "token", True):
            return _stored("fp8.token_channel")
        case (8, "float", "tensor", True), (8, "float", "token" | "tensor", True):
            return _stored("fp8.tensor")
        case (8, "float", "tensor", True), (8, "float", "tensor", False):
            return _stored("fp8.tensor.static")
        case (8, "float", "block", True), (8, "float", "group", True) if (
            w.get("block_structure") == [128, 128] and x and x.get("group_size") == 128
        ):
            return _stored("fp8.block128")
        case (4, "int", "group" | "channel", True), _ if w.get("actorder") in (None, False, "weight", "static"):
            group = -1 if w["strategy"] == "channel" else _group(raw, w.get("group_size"))
            layout = _INT4_LAYOUTS.get(str(form))
            if layout is None:
                raise _refused(raw, f"4-bit integers in format={form!r}, which is none of {', '.join(_INT4_LAYOUTS)}")
            if dynamic is None:
                return _stored(f"int4.pack.g{group}", layout=layout)
            if dynamic == (8, "float", "token", True):
                return _stored(f"w4a8_fp8.g{group}", layout=layout)
        case (4, "float", "tensor_group", True), _ if w.get("group_size") == 16:
            if x is not None and (x.get("num_bits"), x.get("type"), x.get("group_size")) != (4, "float", 16):
                raise _refused(raw, f"input_activations={x}")
            return _stored("nvfp4.g16.a16" if x is None else "nvfp4.g16.static", _NVFP4, layout="nvfp4", inverse=True)
    raise _refused(raw, f"weights={w}, input_activations={x}")


def _modelopt(raw: Mapping[str, Any]) -> QuantConfig:
    ignored = _names_in(raw, "ignore", "exclude_modules")
    if raw.get("quant_algo") != "MIXED_PRECISION":
        return _config(raw, _modelopt_stored(raw, raw), ignored=ignored)
    by_scheme: dict[str, tuple[Stored, set[str]]] = {}
    for name, how in (raw.get("quantized_layers") or {}).items():
        stored = _modelopt_stored(raw, how)
        by_scheme.setdefault(stored.fmt.name, (stored, set()))[1].add(name)
    if not by_scheme:
        raise _refused(raw, "quant_algo='MIXED_PRECISION', and quantized_layers is missing or empty")
    rules = tuple(Rule(stored=stored, names=frozenset(names)) for stored, names in by_scheme.values())
    return QuantConfig(method=str(raw["quant_method"]), rules=rules, ignored=ignored)


def _modelopt_stored(raw: Mapping[str, Any], how: Mapping[str, Any]) -> Stored:
    if how.get("quant_algo") == "FP8":
        return _stored("fp8.tensor.static")
    if how.get("quant_algo") == "NVFP4" and how.get("group_size", 16) == 16:
        return _stored("nvfp4.g16.static", _MODELOPT4, layout="nvfp4")
    raise _refused(raw, f"quant_algo={how.get('quant_algo')!r}, group_size={how.get('group_size')!r}")


def _stored(
    fmt: str, names: Mapping[str, str] | None = None, *, layout: Layout = "plain", inverse: bool = False
) -> Stored:
    return Stored(fmt=Fmt.parse(fmt), layout=layout, names={**_PLAIN, **(names or {})}, inverse=inverse)


def _config(
    raw: Mapping[str, Any], stored: Stored, *, ignored: tuple[str, ...] = (), unread: tuple[str, ...] = ()
) -> QuantConfig:
    """Every layer alike."""
    rules = (Rule(stored=stored, targets=_EVERY),)
    return QuantConfig(method=str(raw["quant_method"]), rules=rules, ignored=ignored, unread=unread)


def _names(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    if "*" in pattern:
        return fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*")  # of a module: all that is in it
    return f".{pattern}." in f".{name}."


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
