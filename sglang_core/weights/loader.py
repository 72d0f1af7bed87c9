"""Weights into a model: from a checkpoint in one pass over its files, or random."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from sglang_core.errors import ConfigError, WeightError
from sglang_core.layers.build import BuildContext, Layer, WeightSpec, bind_model, named_layers
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.weights.checkpoint import CODES, DTYPES, Checkpoint, open_file, resolve_folder
from sglang_core.weights.dummy import dummy_part
from sglang_core.weights.kv_scales import is_attention_scale, kv_scale_name
from sglang_core.weights.packed_cache import PackedCache
from sglang_core.weights.packed_key import checkpoint_identity
from sglang_core.weights.progress import byte_bar

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "safetensors", "dummy"]
IGNORED = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")  # buffers that old checkpoints saved
NAMED = 5  # tensors that an error names
M = TypeVar("M", bound=CausalLM)


def load_model(
    model: M,
    source: str | Path,
    ctx: BuildContext,
    *,
    load_format: str = "auto",
    seed: int = 0,
    progress: bool = True,
    packed_cache: PackedCache | None = None,
) -> M:
    """Bind every layer of `model` and give it its weights from `source`: a folder, "demo" or a hub id (unread for "dummy", which
    on the meta device draws nothing).

    Layers take their weights as soon as their parts are there, so that the peak is the model plus a layer. What `packed_cache`
    has of them is read from there instead; where it has nothing, it gets what the layers packed.

    Raises WeightError, naming tensors, where the checkpoint is not the model's; KernelSelectionError where an op has no kernel.
    """
    bind_model(model, ctx)
    wants, checkpoint = Wants(model), None
    if load_format != "dummy":
        checkpoint = Checkpoint.open(source if isinstance(source, Path) else resolve_folder(source))
    with torch.no_grad():
        entry = None
        if packed_cache is not None:
            identity = {"seed": seed} if checkpoint is None else checkpoint_identity(checkpoint)
            entry = packed_cache.entry(model, ctx, identity)
        packed = entry is not None and entry.restore(progress=progress)
        if entry is not None and packed:
            wants.leave_out(entry.layers)
        start, size = time.monotonic(), wants.num_bytes
        with byte_bar(progress, "loading weights", size) as advance:
            if checkpoint is None:
                _load_dummy(wants, ctx, seed, advance)
            else:
                _load_checkpoint(model, wants, checkpoint, ctx, advance)
        logger.info("weights: %.2f GB loaded in %.1f s (%s)", size / 1e9, time.monotonic() - start, load_format)
        if entry is not None and not packed:
            entry.store(progress=progress)
    return model.eval()


def count_weight_bytes(model: CausalLM) -> int:
    """Bytes of this rank's weights as it will hold them, from shapes: the model must be bound (`bind_model`), not loaded."""
    return sum(spec.nbytes if spec.held is None else spec.held for spec in Wants(model).distinct(as_held=True))


class Wants:
    """What the layers of a bound model want, by tensor name, and the parts that have arrived."""

    def __init__(self, model: CausalLM) -> None:
        self.layers: list[Layer] = []
        self.parts: list[list[Tensor | None]] = []
        self.specs: dict[str, list[tuple[int, int, WeightSpec]]] = {}  # name -> (layer, its part, spec)
        self.elsewhere: set[str] = set()  # names of what other ranks want
        self._left_out: set[int] = set()
        self._names: list[str] = []  # of the layers
        for prefix, layer in named_layers(model):
            self._names.append(prefix)
            specs = layer.weights(prefix)
            for i, spec in enumerate(specs):
                self.specs.setdefault(spec.name, []).append((len(self.layers), i, spec))
            self.elsewhere.update(layer.held_elsewhere(prefix))
            self.layers.append(layer)
            self.parts.append([None] * len(specs))

    def leave_out(self, layers: Container[str]) -> None:
        """Read nothing for these, by name: they have their weights."""
        self._left_out.update(i for i, name in enumerate(self._names) if name in layers)

    def wanted(self) -> Iterator[str]:
        """The tensors to read."""
        return (name for name in self.specs if self._users(name))

    def _users(self, name: str) -> list[tuple[int, int, WeightSpec]]:
        return [user for user in self.specs[name] if user[0] not in self._left_out]

    @property
    def num_bytes(self) -> int:
        """Bytes to read. A tensor that two layers want alike (tied embeddings) counts once."""
        return sum(spec.nbytes for spec in self.distinct())

    def distinct(self, *, as_held: bool = False) -> Iterator[WeightSpec]:
        """The parts that are read; with `as_held`, one that two layers hold differently (a tied head, quantised) is two."""
        for name in self.specs:
            yield from {(s.dim, s.ranges, s.dtype, as_held and s.held): s for _, _, s in self._users(name)}.values()

    def default(self, name: str) -> float | None:
        return self.specs[name][0][2].default

    def give(self, name: str, read: Callable[[WeightSpec], list[Tensor]], device: torch.device) -> int:
        """Hand a tensor's parts to the layers that want them; those that are complete load. Gives the bytes read."""
        made: dict[object, Tensor] = {}
        for layer, i, spec in self._users(name):
            own = not self.layers[layer].copies
            key = (spec.dim, spec.ranges, spec.dtype, own)
            if key not in made:
                made[key] = _part(read(spec), spec, device, own=own)
            self.parts[layer][i] = self.layers[layer].place(i, made[key])
            arrived = [p for p in self.parts[layer] if p is not None]
            if len(arrived) == len(self.parts[layer]):
                self.layers[layer].load(arrived)
                self.parts[layer] = []
        return sum(part.numel() * part.element_size() for part in made.values())


def _part(parts: list[Tensor], spec: WeightSpec, device: torch.device, *, own: bool) -> Tensor:
    """The ranges of a part as one tensor. `own`: nothing of it stays in the mapped file."""
    part = parts[0] if len(parts) == 1 else torch.cat(parts, dim=spec.dim)
    return part.to(device=device, dtype=spec.dtype, copy=own, memory_format=torch.contiguous_format)


def _load_dummy(wants: Wants, ctx: BuildContext, seed: int, advance: Callable[[int], None]) -> None:
    shapes_only = ctx.device.type == "meta"
    if not shapes_only and any(spec.dtype in CODES.values() for spec in wants.distinct()):
        raise ConfigError(
            "load_format='dummy' draws floats, and config.json is of a quantised checkpoint; take out its quantization_config"
        )
    for name in wants.wanted():
        advance(wants.give(name, _shape if shapes_only else lambda spec: dummy_part(spec, seed), ctx.device))


def _shape(spec: WeightSpec) -> list[Tensor]:
    return [torch.empty(spec.part_shape, dtype=spec.dtype, device="meta")]


def _load_checkpoint(
    model: CausalLM, wants: Wants, checkpoint: Checkpoint, ctx: BuildContext, advance: Callable[[int], None]
) -> None:
    names, to_read = _match(model, wants, checkpoint), set(wants.wanted())
    for file, stored in checkpoint.by_file():
        wanted = [name for name in stored if names.get(name) in to_read]
        if not wanted:
            continue
        with open_file(file) as f:
            for name in wanted:
                advance(wants.give(names[name], partial(f.read, name), ctx.device))
    absent = to_read - set(names.values())
    if absent:
        logger.warning("%s: taken as %g", _few("not in the checkpoint", sorted(absent)), wants.default(min(absent)))
    for name in sorted(absent):
        advance(wants.give(name, _default, ctx.device))


def _default(spec: WeightSpec) -> list[Tensor]:
    assert spec.default is not None, "the checkpoint was found to have every other"
    return [torch.full(spec.part_shape, spec.default)]


def _match(model: CausalLM, wants: Wants, checkpoint: Checkpoint) -> dict[str, str]:
    """Checkpoint name -> the model's, for what is wanted. Raises WeightError on every kind of mismatch at once."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    unexpected: list[str] = []
    misshaped: list[str] = []
    quant = model.cfg.quantization
    unread = quant.unread if quant is not None else ()
    for stored, entry in checkpoint.tensors.items():
        name = model.parameter_name(kv_scale_name(stored))
        if name is None or name.endswith(IGNORED + unread) or (name == "lm_head.weight" and model.cfg.tie_embeddings):
            continue
        if name in wants.elsewhere or (is_attention_scale(name) and name not in wants.specs):
            continue
        if name not in wants.specs or name in taken:
            unexpected.append(stored)
            continue
        names[stored] = name
        taken.add(name)
        spec = wants.specs[name][0][2]
        scalar = entry.shape == () and spec.shape == (1,)
        if entry.shape != spec.shape and not scalar:
            misshaped.append(f"{stored} is {list(entry.shape)}, not {list(spec.shape)}")
        elif spec.dtype in CODES.values():
            if CODES.get(entry.dtype) != spec.dtype:
                misshaped.append(f"{stored} is {entry.dtype}, not {str(spec.dtype).removeprefix('torch.')}")
        elif entry.dtype not in DTYPES:
            misshaped.append(f"{stored} is {entry.dtype}, not a float of 16 bits or more")
    problems = [
        _few("missing", [name for name in wants.specs if name not in taken and wants.default(name) is None]),
        _few("unexpected", unexpected),
        _few("of a wrong shape or type", misshaped),
    ]
    if any(problems):
        raise WeightError(
            f"{checkpoint.folder} does not fit {model.cfg.architecture}: {'; '.join(p for p in problems if p)}. "
            "Check that config.json belongs to these weights"
        )
    return names


def _few(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names)} {kind} ({', '.join(names[:NAMED])}{more})"
