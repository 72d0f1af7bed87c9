"""`Decoder`: embedding, layers, last norm. What stands in a layer is the model's."""

from __future__ import annotations

from torch import Tensor, nn

from sglang_core.layers.embedding import Embedding
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.model_config import ModelConfig
from sglang_core.layers.module import Module
from sglang_core.layers.norm import RMSNorm


class Decoder(Module):
    """Layers of one class after another, named as in most checkpoints: `embed_tokens`, `layers`, `norm`.

    A layer is made as layer(cfg, layer_id). Its forward takes and gives (h, residual), [T, M] each; their sum is what flows on.
    The last one gives fewer rows where `ForwardBatch.kept` takes fewer.
    """

    def __init__(self, cfg: ModelConfig, layer: type[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = Embedding(cfg)
        self.layers = nn.ModuleList(layer(cfg, i) for i in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, offset=cfg.norm_offset)

    def forward(self, fb: ForwardBatch) -> Tensor:
        """-> hidden states after the last norm: [T, M], or [S, M] where only sampled rows are read."""
        h: Tensor = self.embed_tokens(fb)
        residual = None
        for layer in self.layers:
            if layer is self.layers[-1]:
                fb.enter_last_layer()
            h, residual = layer(h, residual, fb)
        h, _ = self.norm(h, residual)
        return h
