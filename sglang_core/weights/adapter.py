"""An adapter's files -> this rank's parts of its matrices, checked against the model that it is for.

PEFT's format: a folder with adapter_config.json and adapter_model.safetensors, local, from the hub, or "demo:NAME".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_core import demo
from sglang_core.errors import ConfigError, WeightError
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.lora import LoraSpec, ModelSlots, Pair, Target
from sglang_core.weights.adapter_config import AdapterConfig
from sglang_core.weights.checkpoint import DTYPES, fetch, opened, read_json

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."  # of every name that PEFT writes
KEY = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.weight)?$")
BASE_LAYER = re.compile(
    r"(?P<module>.+?)(\.base_layer)?\.weight$"
)  # PEFT saves adapted embeddings whole beside their adapters
DEMO = "demo:"
VERSION_CHARS = 12
WHOLE = "whole"  # in place of "A" and "B": a weight that is no part of a pair


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter on disk. `version` is a digest of its bytes: equal versions are equal adapters."""

    folder: Path
    config: AdapterConfig
    version: str
    modules: frozenset[str]  # last parts of the names of its modules
    max_rank: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """A rank's part of an adapter, in host memory: `ModelSlots.write` takes its pairs."""

    version: str
    pairs: dict[str, Pair]  # by the model's name of the module
    others: tuple[dict[str, Pair], ...] = ()  # those of other ranks that this process drives

    @property
    def nbytes(self) -> int:
        return sum(pair.nbytes for held in (self.pairs, *self.others) for pair in held.values())


def adapter_folder(path: str) -> Path:
    """A local folder, "demo:NAME" or a hub id, fetched where it is not cached. Raises ConfigError with the way out."""
    if path.startswith(DEMO):
        known = demo.adapters()
        if (name := path.removeprefix(DEMO)) not in known:
            raise ConfigError(f"lora_path={path!r}: the demo adapters are {', '.join(sorted(known)) or 'none'}")
        return known[name]
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ConfigError(
            f"lora_path={path!r} is no folder here, no hub id (owner/name) and no demo adapter (demo:NAME)"
        )
    return fetch(path, None, [CONFIG, WEIGHTS])


def inspect_adapter(path: str, pace: Callable[[], None] = lambda: None) -> AdapterFiles:
    """What an adapter is, from its config, the header of its weights, and a digest of both. Raises ConfigError, WeightError.

    `pace` is called between small pieces of work, here and below: reading beside a step loop rests there.
    """
    folder = adapter_folder(path)
    config = AdapterConfig.parse(read_json(folder / CONFIG), str(folder / CONFIG))
    file = _weights_file(folder)
    modules, max_rank = set(), 0
    with opened(file) as f:
        for key in sorted(f.keys()):
            pace()
            if (match := KEY.match(key)) is not None:
                modules.add(match["module"].rpartition(".")[2])
                shape = f.get_slice(key).get_shape()
                max_rank = max(max_rank, min(shape) if len(shape) == 2 else 0)
    if not modules:
        raise WeightError(f"{file} holds no LoRA matrices (names that end in lora_A.weight and lora_B.weight)")
    return AdapterFiles(folder, config, _digest(folder / CONFIG, file), frozenset(modules), max_rank)


def load_adapter(
    files: AdapterFiles, model: CausalLM, slots: ModelSlots, pace: Callable[[], None] = lambda: None
) -> Adapter:
    """Read the matrices that the ranks of this process hold parts of, and cut them. Raises WeightError that names what does not fit."""
    others = tuple(load_adapter(files, model, rank, pace).pairs for rank in slots.others)
    file = _weights_file(files.folder)
    pairs: dict[str, Pair] = {}
    with opened(file) as f:
        for module, keys in sorted(_by_module(f.keys(), file, model, pace).items()):
            pace()
            if module not in slots.targets:
                _refuse_module(module, keys, f, file, slots, model)
                continue
            target, dtype = slots.targets[module]
            if missing := {"A", "B"} - keys.keys():
                raise WeightError(f"{file}: {module} has no lora_{missing.pop()}; an adapter needs both A and B")
            a, b = (f.get_tensor(keys[side]) for side in "AB")
            _check(file, keys, a, b, target, files.config, slots.spec)
            pairs[module] = _cut(a, b, target, files.config.scale_of(_peft_name(keys["A"])), dtype, file, keys)
    return Adapter(files.version, pairs, others)


def lora_spec(
    adapters: Iterable[AdapterFiles], *, num_slots: int, max_rank: int | None, targets: tuple[str, ...]
) -> LoraSpec:
    """The room to keep: what is asked for, else what the given adapters need. Raises ConfigError where neither says."""
    found = list(adapters)
    if not found and (max_rank is None or not targets):
        raise ConfigError(
            "enable_lora without adapters needs their size: set --max-lora-rank and --lora-target-modules (names such as q_proj, "
            "or all), or give adapters with --lora-paths"
        )
    largest = max((files.max_rank for files in found), default=0)
    if max_rank is not None and largest > max_rank:
        worst = max(found, key=lambda files: files.max_rank)
        raise ConfigError(
            f"max_lora_rank={max_rank} is below rank {largest} of {worst.folder}; set --max-lora-rank {largest}"
        )
    wanted = frozenset(targets) or frozenset(name for files in found for name in files.modules)
    return LoraSpec(num_slots=num_slots, max_rank=max_rank or largest, targets=wanted)


def _weights_file(folder: Path) -> Path:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = f"; {PICKLE} is a pickle and is never read: save it again with safe_serialization=True"
        raise WeightError(f"{folder} has no {WEIGHTS}{pickled if (folder / PICKLE).exists() else ''}")
    return file


def _digest(*files: Path) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:VERSION_CHARS]


def _peft_name(key: str) -> str:
    """The module's name that PEFT matches patterns with."""
    match = KEY.match(key)
    assert match is not None
    return match["module"].removeprefix(PREFIX)


def _by_module(keys: Iterable[str], file: Path, model: CausalLM, pace: Callable[[], None]) -> dict[str, dict[str, str]]:
    """The model's name of each module -> {"A": key, "B": key}; of a whole weight -> {WHOLE: key}."""
    modules: dict[str, dict[str, str]] = {}
    for key in keys:
        pace()
        named = KEY.match(key) or BASE_LAYER.match(key)
        if named is None:
            raise WeightError(
                f"{file}: {key} is no matrix of an adapter (lora_A.weight, lora_B.weight, lora_embedding_A or _B)"
            )
        stored = named["module"].removeprefix(PREFIX)
        name = model.parameter_name(f"{stored}.weight")
        module = stored if name is None else name.removesuffix(".weight")
        side = named.groupdict().get("side")
        modules.setdefault(module if side else key, {})[side or WHOLE] = key
    return modules


def _refuse_module(module: str, keys: dict[str, str], f: Any, file: Path, slots: ModelSlots, model: CausalLM) -> None:
    """Raise for a module that takes no adapter. A base embedding of the model's own shape is left unread: PEFT froze it."""
    taken = sorted({name.rpartition(".")[2] for name in slots.targets})
    if WHOLE not in keys:
        raise WeightError(
            f"{file}: {module} takes no adapter here; modules of {model.cfg.architecture} that do are {', '.join(taken)}, and "
            "--lora-target-modules can name more"
        )
    shape = tuple(f.get_slice(keys[WHOLE]).get_shape())
    if shape != (model.cfg.vocab_size, model.cfg.hidden_size):
        raise WeightError(
            f"{file}: {keys[WHOLE]} is a whole weight {list(shape)}, not an adapter; new tokens and retrained modules are not supported"
        )


def _check(
    file: Path, keys: dict[str, str], a: Tensor, b: Tensor, target: Target, config: AdapterConfig, spec: LoraSpec
) -> None:
    """Raise WeightError for matrices that do not fit the module, the config or the room kept for them."""
    rank = config.rank_of(_peft_name(keys["A"]))
    wanted = {"A": (rank, target.in_features), "B": (target.out_features, rank)}
    for side, tensor in (("A", a), ("B", b)):
        if ("embedding" in keys[side]) != target.is_embedding:
            kind = "lora_embedding_A and _B" if target.is_embedding else "lora_A.weight and lora_B.weight"
            raise WeightError(f"{file}: {keys[side]} is of another kind of module; {target.name} takes {kind}")
        if tuple(tensor.shape) != wanted[side]:
            raise WeightError(
                f"{file}: {keys[side]} is {list(tensor.shape)}, not {list(wanted[side])} as rank {rank} of the config and this "
                "model have it"
            )
        if tensor.dtype not in DTYPES.values():
            raise WeightError(f"{file}: {keys[side]} is {tensor.dtype}, not a float of 16 bits or more")
    if rank > spec.max_rank:
        raise WeightError(
            f"{file}: {target.name} has rank {rank}, and room is kept for {spec.max_rank}; start with --max-lora-rank {rank}"
        )


def _cut(
    a: Tensor, b: Tensor, target: Target, scale: float, dtype: torch.dtype, file: Path, keys: dict[str, str]
) -> Pair:
    """This rank's columns of A and rows of B, as copies in the layer's dtype."""
    start, stop = target.columns
    columns = a[:, start:stop].t() if target.is_embedding else a[:, start:stop]
    rows = torch.cat([b[first:last] for first, last in target.rows])
    held = [part.to(dtype, copy=True, memory_format=torch.contiguous_format) for part in (columns, rows)]
    pair = Pair(held[0], held[1], scale)
    for side, part in (("A", pair.a), ("B", pair.b)):
        if not bool(part.isfinite().all()):
            raise WeightError(f"{file}: {keys[side]} has NaN or infinite elements (as {dtype}); the adapter is broken")
    return pair
