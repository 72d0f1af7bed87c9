"""Token embedding and language-model head, both sharded over the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.layers.assembly import Assembly, num_bytes
from sglang_core.layers.build import BuildContext, Layer, WeightSpec, dtype_name
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.lora import EmbeddingSlots, LinearSlots, Target, covered
from sglang_core.layers.model_config import HeadConfig, ModelConfig
from sglang_core.layers.packing import Packing
from sglang_core.layers.stored import DENSE
from sglang_core.ops.gemm import dense
from sglang_core.ops.weight import PackedWeight
from sglang_core.parallel.groups import padded_part, ragged_shard


class Embedding(Layer):
    """Token ids to rows of the table; each rank looks up the ids in its part, and the sum is the whole lookup."""

    fills_up = True
    weight: Tensor
    lora: EmbeddingSlots | None

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.vocab_size, self.hidden_size, self.scale = cfg.vocab_size, cfg.hidden_size, cfg.embed_scale

    def bind(self, ctx: BuildContext) -> None:
        self.dtype, self._tp = ctx.dtype, ctx.tp
        self.rows = ragged_shard(self.vocab_size, ctx.tp.rank, ctx.tp.size)
        self.padded = padded_part(self.vocab_size, ctx.tp.size)
        # The factor is rounded as the table is: models were trained with sqrt(M) in bfloat16.
        self.rounded_scale = float(torch.tensor(self.scale, dtype=ctx.dtype))
        dims = {"V": self.padded, "M": self.hidden_size}
        site = OpSite(op="embed.lookup", layer="Embedding", dtype=dtype_name(ctx.dtype), dims=dims)
        self._lookup = ctx.table.bind(site).fn
        self.lora = None
        if (spec := covered(ctx.lora, [self.name])) is not None:
            ids, size = self.rows, self.hidden_size
            target = Target(
                name=self.name,
                in_features=self.vocab_size,
                out_features=size,
                columns=ids,
                rows=((0, size),),
                is_embedding=True,
            )
            self.lora = EmbeddingSlots(spec, target, ctx.dtype, ctx.table)

    def weights(self, prefix: str) -> list[WeightSpec]:
        return [_vocab_rows(f"{prefix}.weight", self.vocab_size, self.hidden_size, self.dtype, self.rows)]

    def load(self, parts: list[Tensor]) -> None:
        self.register_buffer("weight", _filled(parts[0], self.padded), persistent=False)

    def forward(self, fb: ForwardBatch) -> Tensor:
        """The step's ids, or its embeddings where it brings them -> [T, M]."""
        if fb.input_embeds is not None:
            return fb.input_embeds
        h: Tensor = self._lookup(fb.token_ids, self.weight, self.rows[0])
        if self.lora is not None:
            h = self.lora(h, fb.token_ids)
        h = self._tp.all_reduce(h)
        return h if self.scale == 1.0 else h * self.rounded_scale


class LMHead(Layer):
    """Hidden states to logits. Each rank computes its part of the vocabulary; every rank gets all of it."""

    fills_up = True
    weight: PackedWeight
    lora: LinearSlots | None

    def __init__(self, cfg: HeadConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def bind(self, ctx: BuildContext) -> None:
        self.dtype, self._tp = ctx.dtype, ctx.tp
        self.rows = ragged_shard(self.cfg.vocab_size, ctx.tp.rank, ctx.tp.size)
        self.padded = padded_part(self.cfg.vocab_size, ctx.tp.size)
        self.stored = DENSE if self.quant is None else self.quant.head
        dims = {"in": self.cfg.hidden_size, "out": self.padded}
        site = OpSite(
            op="gemm.linear", layer="LMHead", dtype=dtype_name(ctx.dtype), fmt=self.stored.fmt.name, dims=dims
        )
        bound = ctx.table.bind_weight(site, online=self.stored.online)
        self._linear, self._pack = bound.fn, bound.pack
        self.packs = None if bound.pack is None else bound
        if bound.dequantized:
            self.stored = DENSE  # it was never quantised
        elif self.stored.online:
            self._quantize = ctx.table.bind(replace(site, op="quant.quantize")).fn
            self.packing = Packing.of(bound, packed=self._num_bytes(), held=self._num_bytes())
        self.lora = None
        if (spec := covered(ctx.lora, [self.name])) is not None:
            vocab, hidden = self.cfg.vocab_size, self.cfg.hidden_size
            target = Target(
                name=self.name, in_features=hidden, out_features=vocab, columns=(0, hidden), rows=(self.rows,)
            )
            self.lora = LinearSlots(spec, [target], ctx.dtype, ctx.table, out=self.padded)
        if self.cfg.soft_cap is not None:
            cap = OpSite(
                op="logits.soft_cap", layer="LMHead", dtype=dtype_name(ctx.dtype), dims={"V": self.cfg.vocab_size}
            )
            self._soft_cap = ctx.table.bind(cap).fn

    @property
    def logits_dtype(self) -> torch.dtype:
        """The layer's own: sampling widens what it reads. What is capped is not rounded again."""
        return self.dtype if self.cfg.soft_cap is None else torch.float32

    def weights(self, prefix: str) -> list[WeightSpec]:
        name = f"{self.cfg.tied_to or prefix}.weight"
        spec = _vocab_rows(name, self.cfg.vocab_size, self.cfg.hidden_size, self.dtype, self.rows)
        return [replace(spec, held=self._num_bytes()) if self.stored.online else spec]

    def load(self, parts: list[Tensor]) -> None:
        part = _filled(parts[0], self.padded)
        weight = self._quantised(part) if self.stored.online else dense(part)
        self.weight = weight if self._pack is None else self._pack(weight)

    def _quantised(self, part: Tensor) -> PackedWeight:
        rows, columns = part.shape
        made = Assembly(self.stored.fmt, rows, columns, where=self.name, quantize=self._quantize)
        (tensor,) = self.stored.tensors(rows, columns, self.dtype)
        made.take(self.stored, tensor, part, rows)
        return made.weight()

    def _num_bytes(self) -> int:
        size = self.cfg.hidden_size
        return num_bytes(self.stored.fmt, self.padded, size, self.dtype, of_columns=size)

    def forward(self, rows: Tensor, row_adapter: Tensor | None = None) -> Tensor:
        """rows: [S, M], row_adapter: int32[S], as `ForwardBatch.token_adapter` -> [S, V], of `logits_dtype`."""
        part = self._linear(rows, self.weight, None)
        if self.lora is not None and row_adapter is not None:
            part = self.lora(part, rows, row_adapter)
        logits = self._tp.all_gather(part, dim=-1)[:, : self.cfg.vocab_size]
        if self.cfg.soft_cap is None:
            return logits
        capped: Tensor = self._soft_cap(logits, self.cfg.soft_cap)
        return capped


def _filled(part: Tensor, rows: int) -> Tensor:
    """A rank's rows of the vocabulary, with zeros up to as many as every rank has: parts of one size can be gathered."""
    missing = rows - part.shape[0]
    return torch.cat([part, part.new_zeros(missing, part.shape[1])]) if missing else part


def _vocab_rows(name: str, vocab: int, hidden: int, dtype: torch.dtype, rows: tuple[int, int]) -> WeightSpec:
    return WeightSpec.of(name, (vocab, hidden), dtype, ranges=(rows,), scale=hidden**-0.5)
