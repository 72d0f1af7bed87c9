"""Linear layers: which rows or columns of a matrix this rank holds, and where the ranks' results meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.layers.assembly import Assembly, num_bytes
from sglang_core.layers.build import BuildContext, Layer, WeightSpec, dtype_name, sibling
from sglang_core.layers.lora import LinearSlots, Target, covered
from sglang_core.layers.packing import Packing
from sglang_core.layers.quant_config import QuantConfig
from sglang_core.layers.stored import DENSE, Ranges, Stored, StoredTensor, check_stacked
from sglang_core.ops.codes import CODE_KINDS, Codes
from sglang_core.ops.formats import Fmt
from sglang_core.ops.gemm import dense
from sglang_core.ops.quant import dequantize, quantize
from sglang_core.ops.weight import PackedWeight
from sglang_core.parallel.groups import HeadShard, aligned_shard, shard_heads

TAKES_CODES = "takes_codes"  # a feature of kernels of gemm.linear


class Linear(Layer):
    """y = x W^T + b, every rank holding all of W. The sharded ones below override `_settle`.

    Facts for this rank, from `_settle`: `parts`, the checkpoint matrices as (name or "" for the layer's own, rows, the ranges
    held), laid one below the other; `columns`, the range of input features held. `fmt` is the format that the layer holds
    them in: the checkpoint's, or "dense" where they are dequantised as they load.
    """

    weight: PackedWeight
    bias: Tensor | None
    copies = True
    unit = 1  # ranks cut between multiples of it, where the layers around must be cut alike
    always_dense = False  # no checkpoint quantises it, whatever its config.json covers, and nor does `--quantization`
    dense_only = ""  # why it needs the dense matrix, where it does
    takes_adapters = True  # False: a layer whose rows are not always the tokens of the step
    lora: LinearSlots | None
    takes = ""  # the kind of codes that `forward` takes in place of activations, as its kernel says; known once bound

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self.parts: list[tuple[str, int, Ranges]] = []
        self.columns = (0, in_features)
        # Of what `weights` asked for, in order: the part it belongs to, and its tensor; None is a bias.
        self._arriving: list[tuple[int, StoredTensor | None]] = []
        self._assemblies: dict[int, Assembly] = {}  # while parts arrive: of all of them, or each its own

    def bind(self, ctx: BuildContext) -> None:
        self.dtype = ctx.dtype
        self._settle(ctx)
        names = [sibling(self.name, part) if part else self.name for part, _, _ in self.parts]
        self.lora = self._slots(ctx, names)
        self.stored = [DENSE if self.always_dense else stored_format(self.quant, name) for name in names]
        if self.dense_only:
            self.stored = [DENSE if stored.online else stored for stored in self.stored]
        mixed = ""
        if any(stored != self.stored[0] for stored in self.stored):
            mixed = f"{', '.join(names)} run as one and are stored unlike"
        quantised = next((s.fmt for s in self.stored if not s.fmt.is_dense), DENSE.fmt)
        site = OpSite(
            op="gemm.linear",
            layer=type(self).__name__,
            dtype=dtype_name(ctx.dtype),
            fmt=quantised.name,
            dims={"in": self.local_in, "out": self.local_out},
        )
        online = any(s.online for s in self.stored)
        bound = ctx.table.bind_weight(site, dense_only=self.dense_only or mixed, online=online)
        self._linear, self._pack, self._bound = bound.fn, bound.pack, bound
        self.packs = None if bound.pack is None else bound
        self.fmt = DENSE.fmt if bound.dequantized else quantised
        if self.lora is None and self.fmt.activation in CODE_KINDS:  # adapters multiply x as it was
            coded = bound.kernels and all(TAKES_CODES in kernel.features for kernel in bound.kernels)
            self.takes = self.fmt.activation if coded else ""
        if not self.fmt.is_dense:
            check_stacked(self.fmt, [b - a for _, _, ranges in self.parts for a, b in ranges], self.name)
        if not quantised.is_dense:
            parts = range(len(self.parts))
            packed, held = (sum(self._num_bytes(fmt, i) for i in parts) for fmt in (quantised, self.fmt))
            self.packing = Packing.of(bound, packed=packed, held=held)
        self._quantize = ctx.table.bind(replace(site, op="quant.quantize")).fn if online else quantize
        self._dequantize = ctx.table.bind(replace(site, op="quant.dequantize")).fn if bound.dequantized else dequantize
        self._reads = [self._part_reads(*part, s) for part, s in zip(self.parts, self.stored, strict=True)]

    def composite(self, ctx: BuildContext, op: str, spec: Any, *others: OpSite) -> Callable[..., Tensor] | None:
        """A kernel of `op`, made of this layer's product and of what is at the sites `others`; None where there is none to take.

        There is none where the layer adds adapters to its product, or holds its weight in another format or packing than the kernel takes.
        """
        product = self._bound.site
        whole = replace(product, op=op, spec=spec, parts=(product, *others))
        if self.lora is not None or self._bound.dequantized or not ctx.table.has_kernel(whole, packed_as=self._bound):
            return None
        return ctx.table.bind(whole).fn

    def _part_reads(
        self, name: str, rows: int, ranges: Ranges, stored: Stored
    ) -> list[tuple[StoredTensor, int, Ranges]]:
        """The tensors of a checkpoint matrix, and the part of each that this rank reads. Raises ConfigError where it is cut."""
        tensors = stored.tensors(rows, self.in_features, self.dtype)
        return [(t, *t.part(ranges, self.columns, (rows, self.in_features), stored.fmt)) for t in tensors]

    def _settle(self, ctx: BuildContext) -> None:
        self.parts = [("", self.out_features, ((0, self.out_features),))]

    @property
    def local_in(self) -> int:
        return self.columns[1] - self.columns[0]

    @property
    def local_out(self) -> int:
        return sum(_num_rows(ranges) for _, _, ranges in self.parts)

    def _num_bytes(self, fmt: Fmt, part: int) -> int:
        rows = _num_rows(self.parts[part][2])
        return num_bytes(fmt, rows, self.local_in, self.dtype, of_columns=self.in_features, first=part == 0)

    def _slots(self, ctx: BuildContext, names: list[str]) -> LinearSlots | None:
        if not self.takes_adapters or (spec := covered(ctx.lora, names)) is None:
            return None
        targets = [
            Target(name=name, in_features=self.in_features, out_features=rows, columns=self.columns, rows=ranges)
            for name, (_, rows, ranges) in zip(names, self.parts, strict=True)
        ]
        return LinearSlots(spec, targets, ctx.dtype, ctx.table)

    def weights(self, prefix: str) -> list[WeightSpec]:
        specs = []
        self._arriving.clear()
        for i, ((name, rows, ranges), reads) in enumerate(zip(self.parts, self._reads, strict=True)):
            at = sibling(prefix, name) if name else prefix
            held: int | None = self._num_bytes(self.fmt, i)
            for t, dim, part in reads:
                scale = self.in_features**-0.5
                specs.append(
                    WeightSpec.of(f"{at}.{t.suffix}", t.shape, t.dtype, dim=dim, ranges=part, scale=scale, held=held)
                )
                held = 0  # the first stands for all
                self._arriving.append((i, t))
            if self.has_bias:
                self._arriving.append((i, None))
                specs.append(WeightSpec.of(f"{at}.bias", (rows,), self.dtype, ranges=ranges, scale=0.1))
        return specs

    def place(self, index: int, part: Tensor) -> Tensor:
        i, tensor = self._arriving[index]
        if tensor is None:
            return part.clone()
        stored, rows = self.stored[i], _num_rows(self.parts[i][2])
        if self._alone(i):
            return self._assembly(i, stored.fmt, rows).take(stored, tensor, part, rows)
        before = sum(_num_rows(ranges) for _, _, ranges in self.parts[:i])
        return self._assembly(0, stored.fmt, self.local_out).take(stored, tensor, part, rows, first_row=before)

    def _alone(self, i: int) -> bool:
        """Whether a part is put together on its own, to be dequantised before it joins the others."""
        return self.fmt.is_dense and not all(stored.fmt.is_dense for stored in self.stored)

    def _assembly(self, key: int, fmt: Fmt, rows: int) -> Assembly:
        if key not in self._assemblies:
            self._assemblies[key] = Assembly(fmt, rows, self.local_in, where=self.name, quantize=self._quantize)
        return self._assemblies[key]

    def load(self, parts: list[Tensor]) -> None:
        biases = [part for part, (_, tensor) in zip(parts, self._arriving, strict=True) if tensor is None]
        weights = [self._assemblies[key].weight() for key in sorted(self._assemblies)]
        self._assemblies.clear()
        if self._alone(0):
            weights = [dense(torch.cat([self._dequantize(w, self.dtype) for w in weights]))]
        self._take(weights[0])
        self.register_buffer("bias", torch.cat(biases) if biases else None, persistent=False)

    def _take(self, weight: PackedWeight) -> None:
        """Hold the canonical weight as the layer's kernel wants it."""
        self.weight = weight if self._pack is None else self._pack(weight)

    def forward(self, x: Tensor | Codes) -> Tensor:
        """x: [..., in], or codes of it of the kind that it `takes` -> [..., out], of this rank."""
        y: Tensor = self._linear(x, self.weight, self.bias)
        return y if self.lora is None else self.lora(y, x)


class ColumnLinear(Linear):
    """Each rank computes its share of the output features."""

    def _settle(self, ctx: BuildContext) -> None:
        held = aligned_shard(self.out_features, ctx.tp.rank, ctx.tp.size, self.unit, "out_features")
        self.parts = [("", self.out_features, (held,))]


class RowLinear(Linear):
    """Each rank holds its share of the input features; the sum over ranks is the result. Rank 0 adds the bias.

    Without `reduce`, the caller sums over ranks: once, where it adds several results.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, reduce: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.reduce = reduce

    def _settle(self, ctx: BuildContext) -> None:
        super()._settle(ctx)
        self.columns = aligned_shard(self.in_features, ctx.tp.rank, ctx.tp.size, self.unit, "in_features")
        self._tp = ctx.tp

    def load(self, parts: list[Tensor]) -> None:
        super().load(parts)
        if self._tp.rank > 0:
            self.bias = None

    def forward(self, x: Tensor | Codes) -> Tensor:
        """x: [..., in of this rank] -> [..., out], summed over ranks."""
        y = super().forward(x)
        return self._tp.all_reduce(y) if self.reduce else y


class QKVLinear(Linear):
    """Query, key and value projections as one matrix, split by heads.

    The checkpoint keeps them as `q_proj`, `k_proj`, `v_proj` beside this layer's name, or as one matrix where `fused`.
    """

    heads: HeadShard

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__(hidden_size, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias)
        self.num_heads, self.num_kv_heads, self.head_dim, self.fused = num_heads, num_kv_heads, head_dim, fused

    def _settle(self, ctx: BuildContext) -> None:
        self.heads = shard_heads(self.num_heads, self.num_kv_heads, ctx.tp.rank, ctx.tp.size)
        d, (q, kv) = self.head_dim, (self.heads.q, self.heads.kv)
        rows = [(q[0] * d, q[1] * d), (kv[0] * d, kv[1] * d), (kv[0] * d, kv[1] * d)]
        sizes = [self.num_heads * d, self.num_kv_heads * d, self.num_kv_heads * d]
        self.parts = _merged(["q_proj", "k_proj", "v_proj"], sizes, rows, self.fused)

    def forward_split(self, x: Tensor | Codes) -> tuple[Tensor, Tensor, Tensor]:
        """x: [T, M] -> q: [T, Hq, D], k, v: [T, Hk, D], views of one tensor."""
        hq, hk = self.heads.num_heads, self.heads.num_kv_heads
        q, k, v = torch.split(self.forward(x).view(-1, hq + 2 * hk, self.head_dim), [hq, hk, hk], dim=1)
        return q, k, v


class GateUpLinear(Linear):
    """Gate and up projections of a gated MLP as one matrix: `gate_proj`, `up_proj` in the checkpoint, or one where `fused`."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False, fused: bool = False) -> None:
        super().__init__(hidden_size, 2 * intermediate_size, bias=bias)
        self.intermediate_size, self.fused = intermediate_size, fused

    def _settle(self, ctx: BuildContext) -> None:
        size = self.intermediate_size
        held = aligned_shard(size, ctx.tp.rank, ctx.tp.size, self.unit, "intermediate_size")
        self.parts = _merged(["gate_proj", "up_proj"], [size, size], [held, held], self.fused)


def codes_for(linears: Sequence[Linear]) -> str:
    """The kind of codes that all of them take in place of activations; "" where they do not agree on one."""
    kinds = {linear.takes for linear in linears}
    return kinds.pop() if len(kinds) == 1 else ""


def stored_format(quant: QuantConfig | None, name: str) -> Stored:
    """How the checkpoint stores a matrix."""
    return DENSE if quant is None else quant.layer(name)


def _num_rows(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def _merged(
    names: list[str], sizes: list[int], held: list[tuple[int, int]], fused: bool
) -> list[tuple[str, int, Ranges]]:
    """The parts of a merged layer: a matrix each, or one matrix that has them one below the other."""
    if not fused:
        return [(name, size, (part,)) for name, size, part in zip(names, sizes, held, strict=True)]
    ranges, base = [], 0
    for size, (start, stop) in zip(sizes, held, strict=True):
        ranges.append((base + start, base + stop))
        base += size
    return [("", base, tuple(ranges))]
