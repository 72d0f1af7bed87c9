"""`CausalLM`: what every decoder model offers to the loader and the runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sglang_core.backend.pool import PoolSpec
from sglang_core.layers.attention import Attention
from sglang_core.layers.embedding import LMHead
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.model_config import ModelConfig
from sglang_core.ops.attention import AttnSpec, Plan
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
    def attn_specs(self) -> tuple[AttnSpec, ...]:
        """The kinds of attention in it, each once: a step needs a plan for each. Known once bound."""
        return tuple(self.attn_plans)

    @property
    def attn_plans(self) -> dict[AttnSpec, Callable[..., Plan]]:
        """The op attn.plan to call for each kind of attention: the one that its kernel was chosen with."""
        return {layer.spec: layer.plan for layer in self._attention()}

    def pool_specs(self, page_size: int, kv_dtype: torch.dtype) -> dict[PoolGroup, PoolSpec]:
        """What each KV pool of this rank holds. Known once bound."""
        layers = list(self._attention())
        spec = layers[0].spec
        return {
            layers[0].group: PoolSpec(
                group=layers[0].group,
                num_layers=len(layers),
                page_size=page_size,
                num_kv_heads=spec.num_kv_heads,
                head_dim=spec.head_dim,
                v_head_dim=spec.v_head_dim,
                dtype=kv_dtype,
            )
        }

    def _attention(self) -> list[Attention]:
        return [module for module in self.modules() if isinstance(module, Attention)]
