"""Linear layers: which rows or columns of a matrix this rank holds, and where the ranks' results meet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.errors import ConfigError
from sglang_core.layers.build import BuildContext, Layer, WeightSpec, dtype_name, sibling
from sglang_core.layers.stored import Ranges, Stored, cut, held, joined
from sglang_core.ops.gemm import dense
from sglang_core.ops.weight import PackedWeight
from sglang_core.parallel.groups import HeadShard, even_shard, shard_heads


class Linear(Layer):
    """y = x W^T + b, every rank holding all of W. The sharded ones below override `_settle`.

    Facts for this rank, from `_settle`: `parts`, the checkpoint matrices as (name or "" for the layer's own, rows, the ranges
    held), laid one below the other; `columns`, the range of input features held.
    """

    weight: PackedWeight
    bias: Tensor | None
    reads_stored = True  # False: a layer whose `load` needs the dense matrix

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        self.parts: list[tuple[str, int, Ranges]] = []
        self.columns = (0, in_features)

    def bind(self, ctx: BuildContext) -> None:
        self.dtype = ctx.dtype
        self._settle(ctx)
        self.stored = self._stored_format()
        site = OpSite(
            op="gemm.linear",
            layer=type(self).__name__,
            dtype=dtype_name(ctx.dtype),
            fmt="dense" if self.stored is None else self.stored.fmt.name,
            dims={"in": self.local_in, "out": self.local_out},
        )
        bound = ctx.table.bind(site)
        self._linear, self._pack = bound.fn, bound.pack

    def _settle(self, ctx: BuildContext) -> None:
        self.parts = [("", self.out_features, ((0, self.out_features),))]

    @property
    def local_in(self) -> int:
        return self.columns[1] - self.columns[0]

    @property
    def local_out(self) -> int:
        return sum(stop - start for _, _, ranges in self.parts for start, stop in ranges)

    def _stored_format(self) -> Stored | None:
        """How the checkpoint stores this layer; None where it is dense. Raises ConfigError where its parts or slices do not fit."""
        if self.quant is None:
            return None
        names = [sibling(self.name, part) if part else self.name for part, _, _ in self.parts]
        found = [self.quant.layer(name) for name in names]
        if not self.reads_stored and any(found):
            raise ConfigError(
                f"{self.name} is quantised ({found[0].fmt.name if found[0] else '?'}), which is not supported for {type(self).__name__} yet"
            )
        if len(set(map(id, found))) > 1:
            raise ConfigError(
                f"only some of {', '.join(names)} are quantised; they run as one matrix and must be alike"
            )
        if (stored := found[0]) is not None:
            for _, rows, ranges in self.parts:
                size = (rows, self.in_features)
                for container in stored.fmt.containers(self.in_features).values():
                    cut(container, stored.fmt, size, ranges, self.columns)
                    if len(self.parts) + len(ranges) > 2 and any((b - a) % (container.rows or 1) for a, b in ranges):
                        raise ConfigError(
                            f"{self.name}: {stored.fmt.name} shares a scale between {container.rows} rows, and parts of "
                            f"{', '.join(str(b - a) for a, b in ranges)} rows cannot be laid one below the other; "
                            "set a smaller --tp-size"
                        )
        return stored

    def weights(self, prefix: str) -> list[WeightSpec]:
        specs = []
        for name, rows, ranges in self.parts:
            at = sibling(prefix, name) if name else prefix
            if self.stored is not None:
                for suffix, stored_shape, dtype in self.stored.wanted(rows, self.in_features):
                    specs.append(WeightSpec(name=f"{at}.{suffix}", shape=stored_shape, dtype=dtype))
                if self.has_bias:
                    specs.append(WeightSpec.of(f"{at}.bias", (rows,), self.dtype, ranges=ranges, scale=0.1))
                continue
            dim, held = (0, ranges) if self.local_in == self.in_features else (1, (self.columns,))
            shape, scale = (rows, self.in_features), self.in_features**-0.5
            specs.append(WeightSpec.of(f"{at}.weight", shape, self.dtype, dim=dim, ranges=held, scale=scale))
            if self.has_bias:
                specs.append(WeightSpec.of(f"{at}.bias", (rows,), self.dtype, ranges=ranges, scale=0.1))
        return specs

    def load(self, parts: list[Tensor]) -> None:
        if self.stored is not None:
            self._load_stored(self.stored, parts)
            return
        matrices, biases = (parts[::2], parts[1::2]) if self.has_bias else (parts, [])
        weight = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        self.weight = packed(weight, self._pack)
        self.register_buffer("bias", torch.cat(biases) if biases else None, persistent=False)

    def _load_stored(self, stored: Stored, parts: list[Tensor]) -> None:
        """Whole stored matrices are converted, and then cut: a file's words may cross the borders of ranks."""
        fmt, matrices, biases, rest = stored.fmt, [], [], iter(parts)
        for _, rows, ranges in self.parts:
            size = (rows, self.in_features)
            whole = stored.canonical([next(rest) for _ in stored.wanted(*size)], *size)
            matrices.append(held(fmt, whole, size, ranges, self.columns))
            if self.has_bias:
                biases.append(next(rest))
        tensors = joined(fmt, matrices, self.name)
        weight = PackedWeight(fmt.name, tensors, out_features=self.local_out, in_features=self.local_in)
        self.weight = weight if self._pack is None else self._pack(weight)
        self.register_buffer("bias", torch.cat(biases) if biases else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], of this rank."""
        y: Tensor = self._linear(x, self.weight, self.bias)
        return y


class ColumnLinear(Linear):
    """Each rank computes its share of the output features."""

    def _settle(self, ctx: BuildContext) -> None:
        held = even_shard(self.out_features, ctx.tp.rank, ctx.tp.size, "out_features")
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
        self.columns = even_shard(self.in_features, ctx.tp.rank, ctx.tp.size, "in_features")
        self._tp = ctx.tp

    def load(self, parts: list[Tensor]) -> None:
        super().load(parts)
        if self._tp.rank > 0:
            self.bias = None

    def forward(self, x: Tensor) -> Tensor:
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

    def forward_split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: [T, M] -> q: [T, Hq, D], k, v: [T, Hk, D], views of one tensor."""
        hq, hk = self.heads.num_heads, self.heads.num_kv_heads
        qkv = self.forward(x).view(-1, hq + 2 * hk, self.head_dim)
        return qkv[:, :hq], qkv[:, hq : hq + hk], qkv[:, hq + hk :]


class GateUpLinear(Linear):
    """Gate and up projections of a gated MLP as one matrix: `gate_proj`, `up_proj` in the checkpoint, or one where `fused`."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False, fused: bool = False) -> None:
        super().__init__(hidden_size, 2 * intermediate_size, bias=bias)
        self.intermediate_size, self.fused = intermediate_size, fused

    def _settle(self, ctx: BuildContext) -> None:
        size = self.intermediate_size
        held = even_shard(size, ctx.tp.rank, ctx.tp.size, "intermediate_size")
        self.parts = _merged(["gate_proj", "up_proj"], [size, size], [held, held], self.fused)


def packed(weight: Tensor, pack: Callable[[PackedWeight], PackedWeight] | None) -> PackedWeight:
    """weight: [out, in] as the kernel of its layer wants it."""
    return dense(weight) if pack is None else pack(dense(weight))


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
