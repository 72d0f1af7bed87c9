"""Weights into a model: from a checkpoint in one pass over its files, or random."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sglang_core.errors import ConfigError, WeightError
from sglang_core.layers.build import BuildContext, Layer, WeightSpec, bind_model, named_layers
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.weights.checkpoint import CODES, DTYPES, Checkpoint, open_file, resolve_folder
from sglang_core.weights.dummy import dummy_part
from sglang_core.weights.kv_scales import is_attention_scale, kv_scale_name

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
) -> M:
    """Bind every layer of `model` and give it its weights from `source`: a folder, "demo" or a hub id (unread for "dummy").

    Layers take their weights as soon as their parts are there, so that the peak is the model plus a layer. Raises WeightError,
    naming tensors, where the checkpoint is not the model's; KernelSelectionError where an op has no kernel.
    """
    bind_model(model, ctx)
    wants = Wants(model)
    start = time.monotonic()
    with torch.no_grad(), _bar(progress, wants.num_bytes) as advance:
        if load_format == "dummy":
            _load_dummy(wants, ctx, seed, advance)
        else:
            folder = source if isinstance(source, Path) else resolve_folder(source)
            _load_checkpoint(model, wants, Checkpoint.open(folder), ctx, advance)
    seconds = time.monotonic() - start
    logger.info("weights: %.2f GB loaded in %.1f s (%s)", wants.num_bytes / 1e9, seconds, load_format)
    return model.eval()


def count_weight_bytes(model: CausalLM) -> int:
    """Bytes of this rank's weights as it will hold them, from shapes: the model must be bound (`bind_model`), not loaded."""
    return sum(spec.nbytes if spec.held is None else spec.held for spec in Wants(model).distinct())


class Wants:
    """What the layers of a bound model want, by tensor name, and the parts that have arrived."""

    def __init__(self, model: CausalLM) -> None:
        self.layers: list[Layer] = []
        self.parts: list[list[Tensor | None]] = []
        self.specs: dict[str, list[tuple[int, int, WeightSpec]]] = {}  # name -> (layer, its part, spec)
        for prefix, layer in named_layers(model):
            specs = layer.weights(prefix)
            for i, spec in enumerate(specs):
                self.specs.setdefault(spec.name, []).append((len(self.layers), i, spec))
            self.layers.append(layer)
            self.parts.append([None] * len(specs))

    @property
    def num_bytes(self) -> int:
        """Bytes to read. A tensor that two layers want alike (tied embeddings) counts once."""
        return sum(spec.nbytes for spec in self.distinct())

    def distinct(self) -> Iterator[WeightSpec]:
        for users in self.specs.values():
            yield from {(s.dim, s.ranges, s.dtype): s for _, _, s in users}.values()

    def default(self, name: str) -> float | None:
        return self.specs[name][0][2].default

    def give(self, name: str, read: Callable[[WeightSpec], list[Tensor]], device: torch.device) -> int:
        """Hand a tensor's parts to the layers that want them; those that are complete load. Gives the bytes read."""
        made: dict[object, Tensor] = {}
        for layer, i, spec in self.specs[name]:
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
    if any(spec.dtype in CODES.values() for spec in wants.distinct()):
        raise ConfigError(
            "load_format='dummy' draws floats, and config.json is of a quantised checkpoint; take out its quantization_config"
        )
    for name in wants.specs:
        advance(wants.give(name, lambda spec: dummy_part(spec, seed), ctx.device))


def _load_checkpoint(
    model: CausalLM, wants: Wants, checkpoint: Checkpoint, ctx: BuildContext, advance: Callable[[int], None]
) -> None:
    names = _match(model, wants, checkpoint)
    for file, stored in checkpoint.by_file():
        wanted = [name for name in stored if name in names]
        if not wanted:
            continue
        with open_file(file) as f:
            for name in wanted:
                advance(wants.give(names[name], partial(f.read, name), ctx.device))
    left_out = wants.specs.keys() - set(names.values())
    if left_out:
        logger.warning("%s: taken as %g", _few("not in the checkpoint", sorted(left_out)), wants.default(min(left_out)))
    for name in sorted(left_out):
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
        if is_attention_scale(name) and name not in wants.specs:
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


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[int], None]]:
    """Gives what to call with the bytes just read: a progress bar on a terminal, elsewhere nothing."""
    if not (wanted and sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)):
        yield lambda num_bytes: None
        return
    columns = (TextColumn("loading weights"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("weights", total=total)
        yield lambda num_bytes: progress.advance(task, num_bytes)
