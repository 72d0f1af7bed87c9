"""`CausalLM`: what every decoder model offers to the loader and the runner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sglang_core.layers.build import PoolLayer
from sglang_core.layers.decoder import Decoder
from sglang_core.layers.embedding import LMHead
from sglang_core.layers.forward_batch import AnyPlan, AnyPoolSpec, AnySpec, ForwardBatch
from sglang_core.layers.lora import AdapterRows
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.module import Module
from sglang_core.types import PoolGroup


class CausalLM(Module):
    """A decoder `model` of layers of one class, `layer`, and its `lm_head`. Build it with a ModelConfig;
    `weights.loader.load_model` makes it run.

    `renames` maps prefixes of checkpoint names to the model's; what starts with one of `ignored` is left in the file.
    """

    layer: ClassVar[type[nn.Module]]
    renames: ClassVar[tuple[tuple[str, str], ...]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()

    adapter_rows: AdapterRows | None = None  # where there is room for adapters: whose is which token of the step

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg, self.layer)
        self.lm_head = LMHead(cfg.config_for_head(tied_to="model.embed_tokens"))

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
        if self.adapter_rows is not None:
            self.adapter_rows.tokens = fb.token_adapter
        h: Tensor = self.model(fb)
        return h

    def head(self, rows: Tensor, row_adapter: Tensor | None = None) -> Tensor:
        """Selected rows of the hidden states: [S, M], and of `token_adapter` -> logits: [S, V], on every rank."""
        logits: Tensor = self.lm_head(rows, row_adapter)
        return logits

    @property
    def logits_dtype(self) -> torch.dtype:
        return self.lm_head.logits_dtype

    @property
    def attn_specs(self) -> tuple[AnySpec, ...]:
        """The kinds of attention in it, each once: a step needs a plan for each. Known once bound."""
        return tuple(self.attn_plans)

    @property
    def attn_plans(self) -> dict[AnySpec, Callable[..., AnyPlan]]:
        """The op attn.plan to call for each kind of attention: the one that its kernel was chosen with."""
        return {layer.spec: layer.plan for layer in self._pool_layers()}

    @property
    def pool_groups(self) -> dict[AnySpec, PoolGroup]:
        """Whose pages each kind of attention reads."""
        return {layer.spec: layer.group for layer in self._pool_layers()}

    def pool_specs(self, page_size: int, kv_dtype: torch.dtype) -> dict[PoolGroup, AnyPoolSpec]:
        """What each pool of this rank holds. Known once bound."""
        groups: dict[PoolGroup, list[PoolLayer]] = {}
        for layer in self._pool_layers():
            groups.setdefault(layer.group, []).append(layer)
        return {group: layers[0].pool_spec(len(layers), page_size, kv_dtype) for group, layers in groups.items()}

    def prepare_pools(self, pools: Mapping[PoolGroup, Any]) -> None:
        """Tell pools what the weights say of them: scales. Before the first step, once the model is loaded."""
        for layer in self._pool_layers():
            layer.prepare_pool(pools[layer.group])

    def _pool_layers(self) -> list[PoolLayer]:
        return [module for module in self.modules() if isinstance(module, PoolLayer)]
