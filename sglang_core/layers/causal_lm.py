"""`CausalLM`: what every decoder model offers to the loader and the runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sglang_core.backend.pool import PoolSpec
from sglang_core.layers.attention import Attention
from sglang_core.layers.embedding import LMHead
from sglang_core.layers.forward_batch import AnyPlan, AnySpec, ForwardBatch
from sglang_core.layers.mla import LatentAttention
from sglang_core.layers.model_config import ModelConfig
from sglang_core.types import PoolGroup


class CausalLM(nn.Module):
    """A decoder `model` and its `lm_head`. Build it with a ModelConfig; `weights.loader.load_model` makes it run.

    `renames` maps prefixes of checkpoint names to the model's; what starts with one of `ignored` is left in the file.
    """

    renames: ClassVar[tuple[tuple[str, str], ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()

    model: nn.Module
    lm_head: LMHead

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg

    @classmethod
    def read_config(cls, hf_config: Mapping[str, Any]) -> ModelConfig:
        """The facts in a checkpoint's config.json. Raises ConfigError for what this model cannot do."""
        return ModelConfig.from_hf(hf_config)

    @classmethod
    def parameter_name(cls, checkpoint_name: str) -> str | None:
        """The model's name of a checkpoint tensor; None where it is not wanted."""
        if checkpoint_name.startswith(cls.ignored):
            return None
        for old, new in cls.renames:
            if checkpoint_name.startswith(old):
                return new + checkpoint_name.removeprefix(old)
        return checkpoint_name

    def forward(self, fb: ForwardBatch) -> Tensor:
        """One step -> hidden states after the last norm: [T, M]."""
        h: Tensor = self.model(fb)
        return h

    def head(self, rows: Tensor) -> Tensor:
        """Selected rows of the hidden states: [S, M] -> logits: float32[S, V], on every rank."""
        logits: Tensor = self.lm_head(rows)
        return logits

    @property
    def attn_specs(self) -> tuple[AnySpec, ...]:
        """The kinds of attention in it, each once: a step needs a plan for each. Known once bound."""
        return tuple(self.attn_plans)

    @property
    def attn_plans(self) -> dict[AnySpec, Callable[..., AnyPlan]]:
        """The op attn.plan to call for each kind of attention: the one that its kernel was chosen with."""
        return {layer.spec: layer.plan for layer in self._attention()}

    def pool_specs(self, page_size: int, kv_dtype: torch.dtype) -> dict[PoolGroup, PoolSpec]:
        """What each KV pool of this rank holds. Known once bound."""
        layers = self._attention()
        return {layers[0].group: layers[0].pool_spec(len(layers), page_size, kv_dtype)}

    def _attention(self) -> list[Attention | LatentAttention]:
        return [module for module in self.modules() if isinstance(module, Attention | LatentAttention)]
