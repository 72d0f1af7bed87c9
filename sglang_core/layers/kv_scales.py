"""`KVScales`: the static scales of one layer's cached keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.backend.kv_dtypes import KV_DTYPES, scaling_of
from sglang_core.backend.pool import Pool
from sglang_core.errors import ConfigError
from sglang_core.layers.build import BuildContext, Layer, WeightSpec, sibling
from sglang_core.layers.kv_scheme import KVScheme


class KVScales(Layer):
    """`k_scale` and `v_scale` beside it in the checkpoint, where pools are fp8: one each, or one a KV head.

    They are 1 where the checkpoint has none. `heads` is what this rank holds of `num_heads`; `latent`: the pool has latents, whose
    one scale is k_scale.
    """

    k_scale: Tensor  # float32[1] or [Hk]
    v_scale: Tensor

    def __init__(self, num_heads: int, scheme: KVScheme | None, *, latent: bool = False) -> None:
        super().__init__()
        self.num_heads, self.latent, self.heads = num_heads, latent, (0, num_heads)
        self.per_head = scheme is not None and scheme.scales == "head"

    def bind(self, ctx: BuildContext) -> None:
        self.wanted = ctx.kv_dtype != "auto" and scaling_of(KV_DTYPES[ctx.kv_dtype]) == "static"
        if self.wanted and self.per_head and self.latent:
            raise ConfigError(
                "config.json: kv_cache_scheme has a scale for each head, and latents have no heads; set --kv-cache-dtype"
            )

    def weights(self, prefix: str) -> list[WeightSpec]:
        if not self.wanted:
            return []
        shape = (self.num_heads, 1, 1) if self.per_head else (1,)
        part = None if not self.per_head or self.heads == (0, self.num_heads) else (self.heads,)
        return [
            WeightSpec(
                name=sibling(prefix, name), shape=shape, dtype=torch.float32, ranges=part, init="ones", default=1.0
            )
            for name in ("k_scale", *(() if self.latent else ("v_scale",)))
        ]

    def load(self, parts: list[Tensor]) -> None:
        """Raises ConfigError where a scale is not a positive number."""
        k, v = parts[0].flatten(), parts[-1].flatten()
        if not all(bool((scale.isfinite() & (scale > 0)).all()) for scale in (k, v)):
            raise ConfigError(
                f"{sibling(self.name, 'k_scale')} or v_scale is not positive: {k.tolist()}, {v.tolist()}; the checkpoint was not "
                "calibrated; set --kv-cache-dtype to another than fp8_e4m3"
            )
        self.register_buffer("k_scale", k, persistent=False)
        self.register_buffer("v_scale", v, persistent=False)

    def hand_to(self, pool: Pool, layer: int) -> None:
        """Let the pool store this layer with them. Once, before the first step."""
        if self.wanted:
            pool.set_scales(layer, self.k_scale, self.v_scale)
