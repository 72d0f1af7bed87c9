"""Packed weights kept on disk (`--packed-cache`): what kernels' `pack` made in one start, read into place in the next.

A file holds all packed weights of one rank, whatever tensors their layout has, and the few others of the layers they belong to
(biases). What no kernel packs is read from the checkpoint as ever. Only the Kernel's `packed_layout` and the key (packed_key.py)
say that bytes may be taken; a file that is not whole, or not what was written, is left with a warning and made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sglang_core.errors import ConfigError, WeightError
from sglang_core.layers.build import BuildContext, Layer, named_layers
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.ops.weight import PackedWeight
from sglang_core.weights.packed_file import PackedFile, write
from sglang_core.weights.packed_key import packed_key
from sglang_core.weights.progress import byte_bar

logger = logging.getLogger(__name__)

KEY, LAYERS = "key", "layers"  # in a file's metadata


class PackedCache:
    """A folder that holds nothing else: made where there is none, and safe to empty whenever no engine starts."""

    def __init__(self, folder: Path, alloc: Callable[[int], Tensor]) -> None:
        """`alloc` is the runtime's `alloc_packed`. Raises ConfigError where the folder cannot be one."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"packed_cache={str(folder)!r} cannot be made a folder ({e}); give another") from e
        self.folder, self.alloc = folder, alloc

    def entry(self, model: CausalLM, ctx: BuildContext, source: Mapping[str, Any]) -> PackedEntry | None:
        """The place of a bound model's packed weights, filled or not; None where nothing of it is packed or may be kept.

        `source` says which weights they are: `checkpoint_identity`, or what stands for it.
        """
        packing = {name: layer for name, layer in named_layers(model) if layer.packs is not None}
        layers = {
            name: layer for name, layer in packing.items() if layer.packs is not None and layer.packs.packed_layout
        }
        backend = ctx.table.backend.name
        if len(layers) < len(packing):
            nameless = sorted({layer.packs.site.op for n, layer in packing.items() if layer.packs and n not in layers})
            logger.warning(
                "packed cache: kernels of %s name no packed_layout; their weights are not kept", ", ".join(nameless)
            )
        if not layers:
            logger.warning("packed cache: %s packs no weights of this model that could be kept; nothing is", backend)
            return None
        key = packed_key(model, layers, ctx, source)
        digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        name = f"{model.cfg.architecture}-{backend}-{ctx.tp.rank}of{ctx.tp.size}-{digest}.safetensors"
        return PackedEntry(self.folder / name, key, layers, ctx, self.alloc)


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """The file of one model, rank and way of packing, and the layers whose weights it holds."""

    path: Path
    key: str
    layers: Mapping[str, Layer]
    ctx: BuildContext
    alloc: Callable[[int], Tensor]

    def restore(self, *, progress: bool) -> bool:
        """Give the layers what the file has for them: all of it or, where there is no such file or no whole one, nothing."""
        start = time.monotonic()
        try:
            file = PackedFile.open(self.path)
            if file.metadata.get(KEY) != self.key:
                raise WeightError("it is of another model or way of packing")
            tensors = {}
            with byte_bar(progress, "reading packed weights", file.num_bytes) as advance:
                for name, tensor in file.read(self.alloc):
                    tensors[name] = tensor.to(self.ctx.device)
                    advance(tensor.nbytes)
            states = json.loads(file.metadata[LAYERS])
        except FileNotFoundError:
            return False
        except (WeightError, OSError) as e:
            logger.warning("packed cache: %s is not used: %s; loading from the checkpoint", self.path, e)
            return False
        for name, layer in self.layers.items():
            _give(layer, states[name], tensors)
        seconds = time.monotonic() - start
        logger.info("packed weights: %.2f GB read from %s in %.1f s", file.num_bytes / 1e9, self.path, seconds)
        return True

    def store(self, *, progress: bool) -> None:
        """Write what the layers hold. Where that fails (no room), there is a warning and no file."""
        start = time.monotonic()
        tensors: dict[str, Tensor] = {}
        states = {name: _take(name, layer, tensors) for name, layer in self.layers.items()}
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        try:
            with byte_bar(progress, "writing packed weights", num_bytes) as advance:
                write(self.path, tensors, {"format": "pt", KEY: self.key, LAYERS: json.dumps(states)}, advance)
        except (WeightError, OSError) as e:
            logger.warning("packed cache: %s is not written: %s; the next start packs again", self.path, e)
            return
        seconds = time.monotonic() - start
        logger.info("packed weights: %.2f GB written to %s in %.1f s", num_bytes / 1e9, self.path, seconds)


def _take(name: str, layer: Layer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Add a layer's tensors to those of the file -> which they are: {"buffers": ..., "weights": {attribute: ...}}."""

    def added(prefix: str, buffers: Mapping[str, Tensor | None]) -> dict[str, str | None]:
        """Buffer -> its tensor in the file, None for one that the layer has not."""
        tensors.update({f"{prefix}.{buffer}": tensor for buffer, tensor in buffers.items() if tensor is not None})
        return {buffer: None if tensor is None else f"{prefix}.{buffer}" for buffer, tensor in buffers.items()}

    weights = {}
    for attribute, w in layer.named_children():
        if isinstance(w, PackedWeight):
            facts = {"fmt": w.fmt, "layout": w.layout, "out_features": w.out_features, "in_features": w.in_features}
            named = {"buffers": added(f"{name}.{attribute}", w._buffers), "num_experts": w.num_experts}
            weights[attribute] = facts | named
    return {"buffers": added(name, layer._buffers), "weights": weights}


def _give(layer: Layer, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `_take`."""
    for attribute, facts in state["weights"].items():
        buffers = {name: tensors[at] for name, at in facts["buffers"].items() if at is not None}
        setattr(layer, attribute, PackedWeight(tensors=buffers, **{k: v for k, v in facts.items() if k != "buffers"}))
    for name, at in state["buffers"].items():
        layer.register_buffer(name, None if at is None else tensors[at], persistent=False)
