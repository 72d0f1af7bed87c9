"""The rotary embedding layer. Layers of one kind share one table."""

from __future__ import annotations

from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.layers.build import BuildContext, Layer, dtype_name
from sglang_core.ops.rope import RopeSpec, rope_table


class RopeTable(Layer):
    """The angles of every position, for an op that rotates."""

    table: Tensor  # float32[context_length, rotary_dim]

    def __init__(self, spec: RopeSpec) -> None:
        super().__init__()
        self.spec = spec

    def site(self, ctx: BuildContext) -> OpSite:
        dims = {"D": self.spec.head_dim}
        return OpSite(op="rope.apply", layer="Rope", dtype=dtype_name(ctx.dtype), spec=self.spec, dims=dims)

    def bind(self, ctx: BuildContext) -> None:
        if self.spec not in ctx.rope_tables:
            ctx.rope_tables[self.spec] = rope_table(self.spec, ctx.context_length, ctx.device)
        self.register_buffer("table", ctx.rope_tables[self.spec], persistent=False)


class Rope(RopeTable):
    """Rotates queries and keys by their positions."""

    def bind(self, ctx: BuildContext) -> None:
        super().bind(ctx)
        self._apply_rope = ctx.table.bind(self.site(ctx)).fn

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q: [T, Hq, D], k: [T, Hk, D], positions: int32[T] -> q, k rotated."""
        q, k = self._apply_rope(q, k, positions, self.table, self.spec)
        return q, k
