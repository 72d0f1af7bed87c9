"""A tiny model as a checkpoint: its config.json and random weights; and the demo model, which has both.

Weights are drawn so that the logits have a deviation of 1 or more, and norms and biases are not at their resting values: else a
missing bias or soft cap would move nothing.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from sglang_conformance.case import Profile, dtype_name
from sglang_core import demo
from sglang_core.backend.communicator import LocalCommunicator
from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.selection import OpTable
from sglang_core.layers.build import BuildContext, WeightSpec, bind_model
from sglang_core.models.registry import create_model
from sglang_core.ops import OPS
from sglang_core.weights.loader import Wants

VOCAB, CONTEXT = 256, 8192
PROSE = (
    "The capital of France is Paris, and that of Japan is Tokyo. The days of the week are Monday, Tuesday, Wednesday, Thursday, "
    "Friday, Saturday and Sunday. One and two make three; three and four make seven. The sky is blue, and grass is green."
)


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """`sizes` is what config.json says beside. `needs`: options that a backend may not state, and so refuse. `covers`: its own ops."""

    name: str
    architecture: str
    model_type: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[Profile, ...] = ()
    covers: tuple[str, ...] = ("attn.paged",)
    full: bool = True

    @property
    def routed(self) -> bool:
        """Whether experts are chosen for each token: a choice that rounding can turn."""
        return "moe.route" in self.covers

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says, but for the dtype."""
        return {"architectures": [self.architecture], "model_type": self.model_type, **self.sizes}

    @contextmanager
    def checkpoint(self, dtype: torch.dtype, seed: int) -> Iterator[Path]:
        """A folder as a hub would give it, with random weights rounded to `dtype`."""
        with tempfile.TemporaryDirectory(prefix="sglang-conformance-") as name:
            folder = Path(name)
            config = self.config | {"dtype": dtype_name(dtype)}
            (folder / "config.json").write_text(json.dumps(config))
            tensors = {
                spec.name: random_weight(spec.name, spec.shape, seed).to(dtype) for spec in wanted(config, dtype)
            }
            save_file(tensors, folder / "model.safetensors")
            yield folder

    def text(self, generator: torch.Generator, length: int) -> list[int]:
        """Token ids of a prompt."""
        return torch.randint(1, VOCAB, (length,), generator=generator).tolist()


class DemoModel(TinyModel):
    """The trained model that core brings, and prompts that are prose."""

    @contextmanager
    def checkpoint(self, dtype: torch.dtype, seed: int) -> Iterator[Path]:
        yield Path(demo.path())

    def text(self, generator: torch.Generator, length: int) -> list[int]:
        ids = prose()
        start = int(torch.randint(len(ids), (), generator=generator))
        return (ids[start:] + ids * (length // len(ids) + 1))[:length]


@cache
def prose() -> list[int]:
    """Token ids of a text as the demo model reads it."""
    tokenizer = Tokenizer.from_file(str(Path(demo.path()) / "tokenizer.json"))
    return tokenizer.encode(PROSE, add_special_tokens=False).ids


def wanted(config: Mapping[str, Any], dtype: torch.dtype) -> Iterator[WeightSpec]:
    """Every tensor of a model's checkpoint, as its layers ask for it."""
    model = create_model(config)
    backend = CpuBackend()
    ctx = BuildContext(
        table=OpTable(backend.probe()[0], backend, ops=OPS, page_size=1),
        dtype=dtype,
        device=torch.device("meta"),
        context_length=CONTEXT,
        page_size=1,
        kv_dtype="auto",
        tp=LocalCommunicator(),
    )
    bind_model(model, ctx)
    return Wants(model).distinct()


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """The same for a name and a seed, whatever else the model has."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if len(shape) >= 2:  # a matrix, or a stack of experts; a little more than what keeps a vector's length
        return noise.mul(1.5 / shape[-1] ** 0.5)
    if name.endswith("A_log"):
        return noise * 0.5 - 2.0  # half of a state is left after some ten tokens, and not after one
    if name.endswith(("bias", "sinks")):
        return noise * 0.5
    return noise * 0.5 + 1.0
