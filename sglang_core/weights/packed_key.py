"""What the packed weights of a rank depend on. Two starts with equal keys make equal bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_core.backend.version import core_version
from sglang_core.layers.build import BuildContext, Layer
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.weights.checkpoint import Checkpoint

SAMPLES, SAMPLE = 64, 4096  # pages of a weight file that are looked at, and their size
CONVERSIONS = ("quant.quantize", "quant.dequantize")


def packed_key(model: CausalLM, layers: Mapping[str, Layer], ctx: BuildContext, source: Mapping[str, Any]) -> str:
    """JSON, the same in every process: of the model as it is configured, what is read of the checkpoint, by which code, and packed how.

    `layers` are those whose kernels pack, by name; `source` is `checkpoint_identity`, or what stands for it.
    """
    table = ctx.table
    key = {
        "core": core_version(),
        "source": dict(source),
        "model": model.cfg,
        "backend": table.backend.name,
        "rank": [ctx.tp.rank, ctx.tp.size, ctx.ep_size],
        "dtype": ctx.dtype,
        "conversions": [(row.op, row.layer, row.fmt, row.kernels) for row in table.explain() if row.op in CONVERSIONS],
        "layers": {name: _layer_key(name, layer) for name, layer in layers.items()},
    }
    return json.dumps(_plain(key), sort_keys=True)


def checkpoint_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Of every weight file its name, size, time of change, header and a sample of its bytes: no file is read whole."""
    return {file.name: _file_identity(file) for file, _ in checkpoint.by_file()}


def _file_identity(file: Path) -> list[Any]:
    facts = file.stat()
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as f:
        digest.update(f.read(int.from_bytes(f.read(8), "little")))
        for i in range(SAMPLES):
            f.seek(i * facts.st_size // SAMPLES)
            digest.update(f.read(SAMPLE))
    return [facts.st_size, facts.st_mtime_ns, digest.hexdigest()]


def _layer_key(name: str, layer: Layer) -> dict[str, Any]:
    bound = layer.packs
    assert bound is not None, "a layer whose kernel packs"
    return {
        "site": bound.site,
        "provider": bound.provider,
        "layout": bound.packed_layout,
        "dequantized": bound.dequantized,
        "reads": layer.weights(name),
    }


def _plain(value: Any) -> Any:
    """As JSON has it. Sets are sorted: their order differs from process to process."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            return {str(k): _plain(v) for k, v in value.items()}
        case set() | frozenset():
            return sorted(map(_plain, value))
        case list() | tuple():
            return [_plain(v) for v in value]
    return repr(value)
