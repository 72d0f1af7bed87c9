"""The experts of a layer as two stacks of matrices, however the checkpoint keeps them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.errors import ConfigError
from sglang_core.layers.assembly import Assembly, dequantized_stack, num_bytes
from sglang_core.layers.build import BuildContext, Layer, WeightSpec, dtype_name
from sglang_core.layers.linear import stored_format
from sglang_core.layers.lora import ExpertSlots, Target, covered
from sglang_core.layers.moe_config import MoEConfig
from sglang_core.layers.packing import Packing
from sglang_core.layers.stored import DENSE, Ranges, Stored, StoredTensor, check_stacked, stored_tensor
from sglang_core.ops.formats import Fmt
from sglang_core.ops.quant import dequantize, quantize
from sglang_core.ops.weight import PackedWeight
from sglang_core.parallel.groups import aligned_shard, shard_experts

EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")


class Experts(Layer):
    """The experts' matrices as two stacks, in any format. A rank holds its share of every expert's width, or experts whole (`ep_size`).

    The checkpoint keeps three matrices an expert, `{i}.{gate, up, down}` below this layer's name. Each tensor of them goes into
    its place in the stacks as it is read.
    """

    w13: PackedWeight  # [X, 2F, M], gate then up; X and F are what this rank holds
    w2: PackedWeight  # [X, M, F]
    bias13: Tensor | None  # [X, 2F]
    bias2: Tensor | None  # [X, M]
    expert_map: Tensor | None  # int32 over all experts: which of these each is, -1 where another rank holds it
    copies = True
    takes_adapters = True
    lora: ExpertSlots | None

    def __init__(self, hidden_size: int, moe: MoEConfig, names: tuple[str, str, str] = EXPERT_NAMES) -> None:
        super().__init__()
        self.hidden_size, self.moe, self.names = hidden_size, moe, names
        self.num_experts = moe.route.num_experts
        self.register_buffer("bias13", None, persistent=False)
        self.register_buffer("bias2", None, persistent=False)
        self.register_buffer("expert_map", None, persistent=False)
        self._arriving: list[
            tuple[int, int, StoredTensor]
        ] = []  # of each part: expert (of those held), which of the three, tensor
        self._stacks: tuple[Assembly, Assembly] | None = None  # while they are being filled

    def bind(self, ctx: BuildContext) -> None:
        self.dtype, self.device, moe = ctx.dtype, ctx.device, self.moe
        shard = shard_experts(self.num_experts, ctx.ep_size, ctx.tp.rank, ctx.tp.size)
        self.experts, self.adds_bias = (
            shard.experts,
            shard.rank == 0,
        )  # results of the ranks that share an expert are summed
        self.stored13, self.stored2 = self._stored_formats()
        formats = self.stored13.fmt, self.stored2.fmt
        unit = math.lcm(self.stored13.row_step(self.hidden_size), self.stored2.column_step(moe.intermediate_size))
        what = "intermediate_size of an expert"
        self.held = aligned_shard(moe.intermediate_size, shard.rank, shard.num_ranks, unit, what)
        quantised = next((fmt for fmt in formats if not fmt.is_dense), DENSE.fmt)
        self.lora = None
        if self.takes_adapters and (spec := covered(ctx.lora, self.names)) is not None:
            self.lora = ExpertSlots(spec, self._targets(), ctx.dtype, self.experts)
        site = OpSite(
            op="moe.fused" if self.lora is None else "lora.experts",
            layer=type(self).__name__,
            dtype=dtype_name(ctx.dtype),
            fmt=quantised.name,
            spec=moe.experts,
            dims={"X": len(self.experts), "K": moe.route.top_k, "M": self.hidden_size, "F": self.width},
        )
        unlike = "" if formats[0] == formats[1] else "its matrices are stored unlike"
        online = self.stored13.online
        bound = ctx.table.bind_weight(site, dense_only=unlike, online=online)
        self._fused, self._pack = bound.fn, bound.pack
        self.packs = None if bound.pack is None else bound
        self.fmt = DENSE.fmt if bound.dequantized else quantised
        convert = replace(site, spec=None, dims={})
        self._quantize = ctx.table.bind(replace(convert, op="quant.quantize")).fn if online else quantize
        self._dequantize = (
            ctx.table.bind(replace(convert, op="quant.dequantize")).fn if bound.dequantized else dequantize
        )
        check_stacked(self.stored13.fmt, [self.width, self.width], self.name)
        self._settle_reads()
        if not quantised.is_dense:
            packed, held = self._stack_bytes(*formats), self._stack_bytes(self.fmt, self.fmt)
            self.packing = Packing.of(bound, packed=packed, held=held)

    @property
    def width(self) -> int:
        """F on this rank."""
        return self.held[1] - self.held[0]

    @property
    def num_held(self) -> int:
        """X on this rank."""
        return len(self.experts)

    def _targets(self) -> list[Target]:
        size, hidden = self.moe.intermediate_size, self.hidden_size
        targets = []
        for i in range(self.num_experts):
            gate, up, down = (f"{self.name}.{i}.{name}" for name in self.names)
            every, share = ((0, hidden), self.held) if i in self.experts else ((0, 0), (0, 0))
            for name in (gate, up):
                targets.append(Target(name=name, in_features=hidden, out_features=size, columns=every, rows=(share,)))
            targets.append(Target(name=down, in_features=size, out_features=hidden, columns=share, rows=(every,)))
        return targets

    def _stored_formats(self) -> tuple[Stored, Stored]:
        """Of gate and up, and of down. Raises ConfigError where experts are unlike."""
        found: tuple[list[Stored], list[Stored]] = [], []
        for i in range(self.num_experts):
            for which, name in enumerate(self.names):
                stored, seen = stored_format(self.quant, f"{self.name}.{i}.{name}"), found[which == 2]
                if stored not in seen:
                    seen.append(stored)
        gate_up, down = found
        if len(gate_up) > 1 or len(down) > 1:
            formats = ", ".join(sorted({s.fmt.name for s in (*gate_up, *down)}))
            raise ConfigError(
                f"{self.name}: its experts are stored unlike ({formats}); a layer's experts run as one and must be alike"
            )
        return gate_up[0], down[0]

    def _settle_reads(self) -> None:
        gate_up, down = self._matrix_reads(self.stored13, down=False), self._matrix_reads(self.stored2, down=True)
        self._reads = (gate_up, gate_up, down)

    def _stack_bytes(self, fmt13: Fmt, fmt2: Fmt) -> int:
        one = self._bytes_of_gate(fmt13) + self._bytes_of_gate(fmt13, first=False) + self._bytes_of_down(fmt2)
        return self.num_held * one

    def _bytes_of_gate(self, fmt: Fmt, *, first: bool = True) -> int:
        """Of one expert; not `first`: of its up matrix, which shares some with the gate's."""
        m = self.hidden_size
        return num_bytes(fmt, self.width, m, self.dtype, of_columns=m, first=first)

    def _bytes_of_down(self, fmt: Fmt) -> int:
        return num_bytes(fmt, self.hidden_size, self.width, self.dtype, of_columns=self.moe.intermediate_size)

    def weights(self, prefix: str) -> list[WeightSpec]:
        specs, self._arriving = [], []
        sizes = self._bytes_of_gate(self.fmt), self._bytes_of_gate(self.fmt, first=False), self._bytes_of_down(self.fmt)
        for i in self.experts:
            for which, name in enumerate(self.names):
                for n, (t, dim, part) in enumerate(self._reads[which]):
                    held = 0 if n else sizes[which]  # a matrix's first tensor stands for all of it
                    at = f"{prefix}.{i}.{name}.{t.suffix}"
                    scale = (self.moe.intermediate_size if which == 2 else self.hidden_size) ** -0.5
                    specs.append(WeightSpec.of(at, t.shape, t.dtype, dim=dim, ranges=part, scale=scale, held=held))
                    self._arriving.append((i - self.experts.start, which, t))
        return specs

    def held_elsewhere(self, prefix: str) -> Iterator[str]:
        for i in range(self.num_experts):
            if i not in self.experts:
                for name, tensors in zip(self.names, self._reads, strict=True):
                    yield from (f"{prefix}.{i}.{name}.{t.suffix}" for t, _, _ in tensors)

    def _matrix_reads(self, stored: Stored, *, down: bool) -> list[tuple[StoredTensor, int, Ranges]]:
        """Of one expert's matrix: each tensor, and the part of it that this rank reads."""
        m, f = self.hidden_size, self.moe.intermediate_size
        size, rows, columns = ((m, f), ((0, m),), self.held) if down else ((f, m), (self.held,), (0, m))
        tensors = stored.tensors(*size, self.dtype)
        return [(t, *t.part(rows, columns, size, stored.fmt)) for t in tensors]

    def place(self, index: int, part: Tensor) -> Tensor:
        expert, which, tensor = self._arriving[index]
        if which == 2:
            return self._stack(1).take(self.stored2, tensor, part, self.hidden_size, expert=expert)
        first = which * self.width
        return self._stack(0).take(self.stored13, tensor, part, self.width, first_row=first, expert=expert)

    def _stack(self, which: int) -> Assembly:
        """w13's or w2's."""
        if self._stacks is None:
            m, f, num = self.hidden_size, self.width, self.num_held
            self._stacks = (
                Assembly(self.stored13.fmt, 2 * f, m, where=self.name, num_experts=num, quantize=self._quantize),
                Assembly(self.stored2.fmt, m, f, where=self.name, num_experts=num, quantize=self._quantize),
            )
        return self._stacks[which]

    def load(self, parts: list[Tensor]) -> None:
        assert self._stacks is not None, "parts come through `place`"
        stacks, self._stacks = self._stacks, None
        w13, w2 = (self._packed(stack.weight()) for stack in stacks)
        self.w13, self.w2 = w13, w2
        if self.num_held < self.num_experts:
            self.expert_map = torch.full((self.num_experts,), -1, dtype=torch.int32, device=self.device)
            held = torch.arange(self.num_held, dtype=torch.int32, device=self.device)
            self.expert_map[self.experts.start : self.experts.stop] = held

    def _packed(self, w: PackedWeight) -> PackedWeight:
        if w.fmt != self.fmt.name:
            w = dequantized_stack(w, self.dtype, self._dequantize)
        return w if self._pack is None else self._pack(w)

    def forward(self, h: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """h: [T, M], weights: float32[T, K], ids: int32[T, K] -> [T, M], this rank's part of the sum over ranks."""
        adapters = () if self.lora is None else (self.lora.adapters, self.lora.spec.rows.tokens)
        y: Tensor = self._fused(
            h,
            self.w13,
            self.w2,
            weights,
            ids,
            self.moe.experts,
            *adapters,
            bias13=self.bias13,
            bias2=self.bias2,
            expert_map=self.expert_map,
        )
        return y


class StackedExperts(Experts):
    """Experts with biases whose checkpoint keeps each matrix of all experts as one tensor (GPT-OSS).

    `gate_up_proj`: [X, M, 2F], gate and up columns in turn; `down_proj`: [X, F, M]. In mxfp4, `gate_up_proj_blocks`:
    uint8[X, 2F, M / 32, 16] with gate and up rows in turn, `down_proj_blocks`: uint8[X, M, F / 32, 16], and `_scales` of each
    without the last dim.
    """

    takes_adapters = False  # there is no name for one expert's matrix

    def _stored_formats(self) -> tuple[Stored, Stored]:
        stored = stored_format(self.quant, self.name)
        if stored.layout not in ("dense", "mxfp4"):
            raise ConfigError(
                f"{self.name} is stored in {stored.fmt.name}; stacked experts are read in mxfp4, bfloat16 or float16"
            )
        return stored, stored

    def _tensors(self) -> tuple[list[StoredTensor], list[StoredTensor]]:
        """What the checkpoint has of w13, and of w2."""
        num, m, f, dtype = self.num_experts, self.hidden_size, self.moe.intermediate_size, self.dtype
        step = self.stored2.column_step(f)
        up, down = [], []
        if self.stored13.layout == "mxfp4":
            for suffix, name, tail in (("blocks", "weight", (step // 2,)), ("scales", "scale", ())):
                shape = (num, 2 * f, m // step, *tail)
                up.append(stored_tensor(name, f"gate_up_proj_{suffix}", shape, torch.uint8, rows=(1, 1)))
                shape = (num, m, f // step, *tail)
                down.append(stored_tensor(name, f"down_proj_{suffix}", shape, torch.uint8, columns=(2, step)))
        else:
            up.append(stored_tensor("weight", "gate_up_proj", (num, m, 2 * f), dtype, rows=(2, 1)))
            down.append(stored_tensor("weight", "down_proj", (num, f, m), dtype, columns=(1, 1), align=step))
        up.append(stored_tensor("bias", "gate_up_proj_bias", (num, 2 * f), dtype, rows=(1, 1)))
        down.append(stored_tensor("bias", "down_proj_bias", (num, m), dtype))
        return up, down

    def _settle_reads(self) -> None:
        m, f, (start, stop) = self.hidden_size, self.moe.intermediate_size, self.held
        up, down = self._tensors()
        pairs = ((2 * start, 2 * stop),)
        parts = [(t, 0, *t.part(pairs, (0, m), (2 * f, m), self.stored13.fmt)) for t in up]
        parts += [(t, 1, *t.part(((0, m),), self.held, (m, f), self.stored2.fmt)) for t in down]
        self._parts = [(t, which, *self._of_experts(t, dim, part)) for t, which, dim, part in parts]

    def _of_experts(self, t: StoredTensor, dim: int, part: Ranges) -> tuple[int, Ranges, int]:
        """What is read of a tensor of all experts, a range along one dim: experts, if they are held whole. And where ours begin in that."""
        first, stop = self.experts.start, self.experts.stop
        whole = part == ((0, t.shape[dim]),)
        return (0, ((first, stop),), 0) if whole else (dim, part, first)

    def weights(self, prefix: str) -> list[WeightSpec]:
        m, f = self.hidden_size, self.moe.intermediate_size
        of_stack = 2 * self._bytes_of_gate(self.fmt), self._bytes_of_down(self.fmt)
        specs = []
        for t, which, dim, part, _ in self._parts:
            held = {"weight": self.num_held * of_stack[which], "scale": 0}.get(t.name)  # a weight stands for its scales
            scale = 0.1 if t.name == "bias" else (m, f)[which] ** -0.5
            at = f"{prefix}.{t.suffix}"
            specs.append(WeightSpec.of(at, t.shape, t.dtype, dim=dim, ranges=part, scale=scale, held=held))
        return specs

    def held_elsewhere(self, prefix: str) -> Iterator[str]:
        return iter(())  # each tensor has experts of all ranks

    def place(self, index: int, part: Tensor) -> Tensor:
        t, which, _, _, first = self._parts[index]
        part = part[first : first + self.num_held]
        if t.name == "bias":
            return part.clone() if which == 1 else torch.cat([part[:, 0::2], part[:, 1::2]], dim=1)
        stored, stack = (self.stored13, self.stored2)[which], self._stack(which)
        for expert in range(self.num_held):
            matrix = part[expert].t() if stored.layout == "dense" else part[expert].flatten(1)
            if which == 1:
                at = stack.take(stored, t, matrix, self.hidden_size, expert=expert)
                continue
            stack.take(stored, t, matrix[0::2], self.width, expert=expert)
            at = stack.take(stored, t, matrix[1::2], self.width, first_row=self.width, expert=expert)
        return at

    def load(self, parts: list[Tensor]) -> None:
        super().load(parts)
        self.bias13, bias2 = (p for p, (t, *_) in zip(parts, self._parts, strict=True) if t.name == "bias")
        self.bias2 = bias2 if self.adds_bias else None
