"""A loaded model with room for adapters, run a step at a time: each req of a step with the adapter of a slot, or none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_core.layers.build import bind_model
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.lora import LoraSpec, ModelSlots
from sglang_core.models.registry import model_class
from sglang_core.weights.adapter import inspect_adapter, load_adapter, lora_spec
from sglang_core.weights.checkpoint import read_config
from sglang_core.weights.loader import load_model
from tests.models.harness import CPU, Row, Stepper, build_context


class Adapted:
    """The model in `folder` and the adapters of `paths`, in slots of their order; `changes` are of its config."""

    def __init__(
        self,
        folder: Path,
        paths: Mapping[str, Path],
        *,
        num_slots: int = 4,
        spec: LoraSpec | None = None,
        changes: Mapping[str, Any] | None = None,
        **context: Any,
    ) -> None:
        files = {name: inspect_adapter(str(path)) for name, path in paths.items()}
        self.spec = spec or lora_spec(files.values(), num_slots=num_slots, max_rank=None, targets=())
        hf_config = read_config(folder)
        found = model_class(hf_config)
        self.model: CausalLM = found(found.read_config(hf_config).replace(**(changes or {})))
        ctx = replace(build_context(**context), lora=self.spec)
        bind_model(self.model, ctx)
        self.slots = ModelSlots(self.model, self.spec)
        load_model(self.model, folder, ctx, progress=False)
        self.slots.allocate(CPU)
        self.slot: dict[str | None, int] = {None: -1}
        self.pairs = {name: load_adapter(each, self.model, self.slots).pairs for name, each in files.items()}
        for slot, (name, pairs) in enumerate(self.pairs.items()):
            self.slots.write(slot, pairs)
            self.slot[name] = slot
        self.stepper = Stepper(self.model)

    def step(self, work: list[tuple[Row, list[int], str | None]]) -> list[Tensor]:
        """Extend each req by its tokens -> logits of every new token."""
        fb = self.stepper.batch([(row, tokens) for row, tokens, _ in work])
        rows = [self.slot[name] for _, tokens, name in work for _ in tokens]
        if max(rows) >= 0:
            fb.token_adapter = torch.tensor(rows, dtype=torch.int32)
        with torch.inference_mode():
            logits = self.model.head(self.model(fb), fb.token_adapter)
        return list(logits.split([len(tokens) for _, tokens, _ in work]))

    def logits(self, tokens: list[int], name: str | None) -> Tensor:
        return self.step([(Row(), tokens, name)])[0]
