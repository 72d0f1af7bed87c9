"""Frozen settings, a tree split by owner. Flags, YAML keys and `Engine(...)` keywords are all made from these fields.

`EngineConfig.from_flat(model_path=..., page_size=16, ...)` builds the tree from flat names; the names are SGLang's wherever it
has the same setting. A value of None means "auto"; `engine.resolve` settles every one before anything is built.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sglang_core.errors import ConfigError

KNOWN_DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_PORT = 65535


def setting(
    default: Any,
    help: str,
    *,
    common: bool = False,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
    flag: str = "",
    aliases: tuple[str, ...] = (),
) -> Any:
    """A config field: its default, its help line, and whether `--help` shows it (`--help-all` shows every one)."""
    meta = {
        "help": help,
        "common": common,
        "choices": choices,
        "low": low,
        "high": high,
        "flag": flag,
        "aliases": aliases,
    }
    return field(default=default, metadata=meta)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfigArgs:
    """Which model, from where, in which precision."""

    model_path: str = setting(
        "", "local folder, hub id, or 'demo' for the embedded demo model", common=True, aliases=("model",)
    )
    tokenizer_path: str | None = setting(None, "tokenizer folder or hub id; the model's own by default", common=True)
    served_model_name: str | None = setting(None, "name in the API; the model path by default", common=True)
    dtype: str = setting("auto", "weights and activations", common=True, choices=KNOWN_DTYPES)
    context_length: int | None = setting(
        None, "tokens a request may hold; the model's own by default", common=True, low=1
    )
    load_format: str = setting(
        "auto", "checkpoint format; dummy means random weights", common=True, choices=("auto", "safetensors", "dummy")
    )
    quantization: str | None = setting(
        None,
        "fp8, int8 or int4: quantise linear layers and experts of a float checkpoint as it is read; a checkpoint that is "
        "quantised needs no flag",
        common=True,
    )
    quantize_lm_head: bool = setting(
        False, "with --quantization: the head as well, which is otherwise kept as the checkpoint has it"
    )
    packed_cache: str | None = setting(
        None,
        "folder to keep weights in as the device's kernels pack them: later starts of the same model read them from there and "
        "pack nothing; takes the room of the weights, a file a rank",
    )
    revision: str | None = setting(None, "hub revision")
    trust_remote_code: bool = setting(False, "allow code from the checkpoint to run in tokenizer and config")
    skip_tokenizer_init: bool = setting(False, "serve token ids only")
    chat_template: str | None = setting(
        None, "file with a Jinja chat template; the tokenizer's own by default", common=True
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceArgs:
    """Which backend, and how strictly its claims are held."""

    device: str = setting("auto", "backend name, name:index, or auto (the best one probed)", common=True)
    kernel: tuple[str, ...] = setting(
        (),
        "OP=PROVIDER: force a kernel provider for an op, or OP[FORMAT]=PROVIDER where its weights have a format; repeatable",
    )
    fallback: str = setting(
        "auto",
        "what to do where a claimed kernel refuses: auto is error for attention, GEMM and MoE and warn for the rest",
        choices=("auto", "error", "warn", "allow"),
    )
    quant_fallback: str = setting(
        "auto",
        "what to do where no kernel takes a weight format: dequantize at load, run the op's body on packed weights "
        "(reference), or error; auto dequantizes where a kernel takes dense weights, else reference",
        choices=("auto", "dequantize", "reference", "error"),
    )
    deterministic: bool = setting(False, "only batch-invariant kernels, one variant an op")
    verify_kernels: float = setting(0.0, "share of live steps re-run on the reference bodies", low=0.0, high=1.0)
    strict_compile: bool = setting(
        False, "where steps are compiled at start: one that no bucket holds is an error, not compiled while reqs wait"
    )
    prefill_graph_tokens: int | None = setting(
        None,
        "where steps are captured: those with prefill too, up to so many tokens, each padded to the next of a few sizes that "
        "are captured at start; longer ones run kernel by kernel (0: all of them); the backend's own by default",
        low=0,
    )
    num_threads: int | None = setting(None, "CPU threads an engine rank computes with; all its cores by default", low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheArgs:
    """The KV pools and the radix cache over them."""

    mem_fraction_static: float | None = setting(
        None, "share of device memory for weights and KV pools", common=True, low=0.01, high=1.0
    )
    max_total_tokens: int | None = setting(
        None, "size of the KV pool in tokens; fitted to memory by default", common=True, low=1
    )
    page_size: int | None = setting(None, "tokens a KV page holds", common=True, low=1, high=1024)
    disable_radix_cache: bool = setting(False, "no prefix reuse between requests", common=True)
    radix_eviction_policy: str = setting("lru", "which unpinned pages leave first", choices=("lru",))
    kv_cache_dtype: str = setting(
        "auto",
        "precision of cached keys and values; auto is the checkpoint's, else that of activations",
        common=True,
        choices=("auto", "float32", "bfloat16", "bf16", "float16", "fp16", "fp8_e4m3", "int8"),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleArgs:
    """Who runs next."""

    schedule_policy: str = setting(
        "lpm", "order of the waiting queue", common=True, choices=("fcfs", "lpm", "dfs-weight", "priority")
    )
    max_running_requests: int | None = setting(None, "requests in a batch at most", common=True, low=1)
    max_queued_requests: int | None = setting(None, "waiting requests before 429 is answered", low=1)
    chunked_prefill_size: int | None = setting(
        None,
        "new tokens a step computes at most; longer prompts are cut in chunks (-1: never cut)",
        common=True,
        low=-1,
    )
    disable_overlap_schedule: bool = setting(False, "do not schedule the next step while one runs", common=True)
    random_seed: int = setting(0, "seeds dummy weights and requests that bring none", common=True, low=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelArgs:
    """How the model is spread over ranks."""

    tp_size: int = setting(1, "ranks that share each layer", common=True, low=1, aliases=("tensor-parallel-size", "tp"))
    ep_size: int = setting(
        1,
        "groups of those ranks that experts are dealt to, whole; 1: every rank has a share of each expert",
        low=1,
        aliases=("expert-parallel-size", "ep"),
    )
    dp_size: int = setting(
        1,
        "replicas of the engine, each on devices of its own; a request goes to one",
        common=True,
        low=1,
        aliases=("data-parallel-size", "dp"),
    )
    load_balance_method: str = setting(
        "total_requests",
        "the replica that a request goes to: with the fewest requests, the fewest tokens of them, or the next",
        choices=("total_requests", "total_tokens", "round_robin"),
    )
    dist_timeout: int = setting(600, "seconds a collective may take before the engine is declared dead", low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraArgs:
    """LoRA adapters, many in one batch."""

    enable_lora: bool = setting(False, "keep room for LoRA adapters; --lora-paths implies it")
    lora_paths: tuple[str, ...] = setting(
        (), "NAME=PATH or PATH: adapters to serve from the start; folders, hub ids or demo:capitals", common=True
    )
    max_loras_per_batch: int = setting(8, "adapters on the device, so in a batch, at most", low=1)
    max_lora_rank: int | None = setting(None, "largest rank; that of --lora-paths by default", low=1)
    lora_target_modules: tuple[str, ...] = setting(
        (),
        "modules that adapters may target (q_proj ...; all: every linear layer; embed_tokens and lm_head are named apart); "
        "those of --lora-paths by default",
    )
    max_loaded_loras: int | None = setting(
        None, "adapters in host memory at most; the least recently used leave, and are read again when asked for", low=1
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerArgs:
    """HTTP and its doors."""

    host: str = setting("127.0.0.1", "address to listen on", common=True)
    port: int = setting(30000, "port to listen on", common=True, low=0, high=MAX_PORT)
    api_key: str | None = setting(None, "key that every request must bring as a bearer token", common=True)
    admin_api_key: str | None = setting(
        None, "key for the admin routes; without it they answer loopback only", common=True
    )
    log_level: str = setting("info", "lowest level logged", common=True, choices=("debug", "info", "warning", "error"))
    log_requests: bool = setting(False, "log one line a request (never its text)")
    enable_metrics: bool = setting(True, "serve Prometheus metrics at /metrics", common=True)
    stream_interval: int = setting(1, "tokens between two stream events", low=1)
    drain_timeout: int = setting(60, "seconds running requests get to finish on SIGTERM", low=0)
    watchdog_timeout: int = setting(300, "seconds a step may take before the engine is declared hung", low=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The whole tree. `in_process` runs the engine in a thread of this process, for tests and debuggers."""

    model: ModelConfigArgs = field(default_factory=ModelConfigArgs)
    device: DeviceArgs = field(default_factory=DeviceArgs)
    cache: CacheArgs = field(default_factory=CacheArgs)
    schedule: ScheduleArgs = field(default_factory=ScheduleArgs)
    parallel: ParallelArgs = field(default_factory=ParallelArgs)
    lora: LoraArgs = field(default_factory=LoraArgs)
    server: ServerArgs = field(default_factory=ServerArgs)
    in_process: bool = False

    @classmethod
    def from_flat(cls, **settings: Any) -> EngineConfig:
        """Build the tree from flat setting names. Raises ConfigError on an unknown name or a value out of bounds."""
        owners = {f.name: (branch, f) for branch, f in all_settings()}
        parts: dict[str, dict[str, Any]] = {}
        in_process = bool(settings.pop("in_process", False))
        for name, value in settings.items():
            if name not in owners:
                near = difflib.get_close_matches(name, owners, n=1)
                raise ConfigError(f"unknown setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
            branch, spec = owners[name]
            parts.setdefault(branch, {})[name] = _checked(name, value, spec)
        branches = {branch: _BRANCHES[branch](**values) for branch, values in parts.items()}
        return cls(in_process=in_process, **branches)

    def flat(self) -> dict[str, Any]:
        """Every setting by its flat name: the inverse of `from_flat`."""
        out = {f.name: getattr(getattr(self, branch), f.name) for branch, f in all_settings()}
        return out | {"in_process": self.in_process}


_BRANCHES: Mapping[str, Any] = {
    "model": ModelConfigArgs,
    "device": DeviceArgs,
    "cache": CacheArgs,
    "schedule": ScheduleArgs,
    "parallel": ParallelArgs,
    "lora": LoraArgs,
    "server": ServerArgs,
}


def all_settings() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every setting as (branch name, dataclass field), in the order in which help lists them."""
    for branch, owner in _BRANCHES.items():
        for f in dataclasses.fields(owner):
            yield branch, f


def setting_type(branch: str, name: str) -> tuple[type, bool, bool]:
    """The value type of a setting, whether None ("auto") is allowed, and whether it is a repeatable list."""
    hint = get_type_hints(_BRANCHES[branch])[name]
    if get_origin(hint) is tuple:
        return get_args(hint)[0], False, True
    if args := get_args(hint):
        return next(a for a in args if a is not type(None)), True, False
    return hint, False, False


def _checked(name: str, value: Any, spec: dataclasses.Field[Any]) -> Any:
    branch = next(b for b, f in all_settings() if f.name == name)
    kind, optional, repeated = setting_type(branch, name)
    if value is None and optional:
        return None
    if repeated:
        if isinstance(value, Mapping):
            value = [f"{key}={each}" for key, each in value.items()]
        values = (value,) if isinstance(value, str) else tuple(value)
        return tuple(_scalar(name, v, kind, spec) for v in values)
    return _scalar(name, value, kind, spec)


def _scalar(name: str, value: Any, kind: type, spec: dataclasses.Field[Any]) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{name}={value!r} must be {kind.__name__}, not {type(value).__name__}")
    meta = spec.metadata
    if meta["choices"] and value not in meta["choices"]:
        near = difflib.get_close_matches(str(value), meta["choices"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(meta['choices'])}{hint}")
    low, high = meta["low"], meta["high"]
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{name}={value!r} must be {bounds}")
    return value


LogLevel = Literal["debug", "info", "warning", "error"]
