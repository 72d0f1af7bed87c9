"""`Env`: where a case runs. The same seed gives the same numbers in each of the three."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sglang_conformance.guard import guarded
from sglang_conformance.packing import check_packing
from sglang_conformance.rank import Program, run_reference
from sglang_conformance.rank_host import COLLECTIVE_LIMIT, RankHost
from sglang_core.backend.interface import DeviceRuntime, RuntimeContext
from sglang_core.backend.kernel import OpSite
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.selection import BoundOp, OpTable
from sglang_core.backend.state_pool import StatePool, StatePoolSpec
from sglang_core.backend.torch_runtime import TorchRuntime
from sglang_core.errors import DeviceError
from sglang_core.ops import OPS
from sglang_core.ops.attention import AttnSpec
from sglang_core.ops.formats import Fmt
from sglang_core.ops.gemm import dense
from sglang_core.ops.mla import MLASpec
from sglang_core.ops.rope import RopeSpec
from sglang_core.ops.ssm_plan import GatedDeltaSpec
from sglang_core.ops.weight import PackedWeight
from sglang_core.types import STATE

CPU = torch.device("cpu")
VAST = 1 << 24  # elements from which on memory is fresh from the operating system
FAR_BYTES = 8 << 30  # of keys and values in a half type, where slots go past 2^31 elements
X_SCALE = 0.02  # of formats that bring the scale of their activations
Op = Callable[..., Any]
PAGED_OPS = ("attn.paged", "attn.plan", "kv.write")
ROPE_PAGED = "attn.rope_paged"
MLA_OPS = ("attn.mla_paged", "attn.mla_plan", "kv.write_mla")
STATE_OPS = ("ssm.gated_delta_rule", "ssm.causal_conv1d", "ssm.plan")


class NoRoomError(Exception):
    """A case takes more than there is: memory for an emulation, devices for ranks."""


class Env(ABC):
    """What a case is given: seeded numbers, and pools, weights and ops of one device."""

    device: torch.device
    runtime: DeviceRuntime

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.seed = dtype, seed
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normal numbers, rounded to the case's dtype."""
        x = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return self.floats(x * scale + mean)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int32 in [low, high)."""
        return self.place(torch.randint(low, high, shape, generator=self._generator).to(torch.int32))

    def permutation(self, n: int) -> Tensor:
        """int32[n] on the host."""
        return torch.randperm(n, generator=self._generator).to(torch.int32)

    def floats(self, x: Tensor) -> Tensor:
        """x, rounded to the case's dtype."""
        return self.place(x.to(self.dtype))

    def sliced(self, x: Tensor, offset: int = 16) -> Tensor:
        """x as a slice of a wider tensor of NaN: rows lie apart, and begin `offset` elements in. The last dim stays dense."""
        wide = x.new_full((x.shape[0] + 2, *x.shape[1:-1], x.shape[-1] + 2 * offset), float("nan"))
        view = wide[1:-1, ..., offset : offset + x.shape[-1]]
        return view.copy_(x)

    def vast(self, *shape: int) -> Tensor:
        """Zeros in the case's dtype. Of a large tensor on the host nothing is touched: memory is mapped when it is."""
        x = torch.empty(shape, dtype=self.floats(torch.zeros(0)).dtype, device=self.device)
        fresh = self.device.type == "cpu" and x.numel() >= VAST
        return x if fresh else x.zero_()

    def weight(self, rows: int, columns: int, site: OpSite) -> PackedWeight:
        """A random matrix in `site.fmt`, as the kernel at `site` wants it."""
        return self.packed(self.canonical(site.fmt, rows, columns), site)

    def experts(self, num: int, rows: int, columns: int, site: OpSite) -> PackedWeight:
        """A stack of random matrices in `site.fmt`, as the kernel at `site` wants it."""
        return self.packed(self.canonical(site.fmt, num, rows, columns), site)

    @abstractmethod
    def place(self, x: Tensor) -> Tensor:
        """A host tensor, where and as this env computes."""

    @abstractmethod
    def packed(self, weight: PackedWeight, site: OpSite, *, checked: bool = True) -> PackedWeight:
        """A canonical weight as the kernel at `site` wants it; with `checked`, what packs it is tried on it."""

    def canonical(self, fmt: str, *shape: int) -> PackedWeight:
        """Random weights, canonical: the same codes and scales wherever the case runs."""
        w = torch.randn(shape, generator=self._generator, dtype=torch.float64).to(self.dtype)
        if fmt == "dense":
            return dense(self.place(w))
        x_scale = torch.full((*shape[:-2], 1), X_SCALE) if Fmt.parse(fmt).static else None
        tensors = dict(OPS["quant.quantize"].body(w, fmt, x_scale=x_scale).named_buffers())
        if "group" in tensors:  # a checkpoint's columns are in groups in no order
            tensors["group"] = tensors["group"][..., self.permutation(shape[-1])].contiguous()
        num = shape[0] if len(shape) == 3 else None
        tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        return PackedWeight(fmt, tensors, out_features=shape[-2], in_features=shape[-1], num_experts=num)

    @abstractmethod
    def op(self, name: str, **facts: Any) -> Op:
        """The op, bound at a site with these facts (spec, dims, fmt)."""

    @abstractmethod
    def paged_ops(
        self, spec: AttnSpec | MLASpec, page_size: int, rotary: RopeSpec | None = None, *, normed: bool = False
    ) -> dict[str, Op]:
        """The ops that share a KV pool; of a MLASpec, a pool of latents. `rotary`: also attn.rope_paged, with norms or without."""

    @abstractmethod
    def state_ops(self, spec: GatedDeltaSpec) -> dict[str, Op]:
        """The ops that share a pool of states."""

    @abstractmethod
    def pool(self, spec: PoolSpec, num_pages: int, *, poisoned: bool = True) -> Pool:
        """A pool full of NaN, or of anything."""

    @abstractmethod
    def far(self, count: int) -> int:
        """`count` on the device; a few on the host, where bodies need no large memory to be right."""

    @abstractmethod
    def batch_invariant(self, op: str) -> bool:
        """Whether the kernel that was bound says that a row's result does not depend on its neighbours."""

    @abstractmethod
    def takes_codes(self, op: str) -> bool:
        """Whether what was bound takes activations that are quantised already."""

    @abstractmethod
    def state_pool(self, spec: StatePoolSpec, num_slots: int, *, poisoned: bool = True) -> StatePool:
        """A pool of states full of NaN, or of anything."""

    @abstractmethod
    def ranks(
        self,
        program: Program,
        size: int,
        args: Mapping[str, Any],
        *,
        dead: tuple[int, ...] = (),
        timeout: float = COLLECTIVE_LIMIT,
    ) -> dict[int, Mapping[str, Tensor]]:
        """What each of `size` ranks makes of a program, by rank. Those in `dead` end on the way, and make nothing."""

    @abstractmethod
    def engine_tokens(self, prompts: Sequence[str], **settings: Any) -> list[list[int]]:
        """Greedy tokens of the demo model in float32, by an engine of this device; none where there is no device."""


class BodyEnv(Env):
    """The op bodies on the host, in the case's dtype; or, as the oracle, in float64 from inputs rounded to that dtype."""

    device = CPU

    def __init__(self, dtype: torch.dtype, seed: int, *, oracle: bool = False) -> None:
        super().__init__(dtype, seed)
        self._oracle = oracle
        self.runtime = TorchRuntime(RuntimeContext(devices=()))

    def place(self, x: Tensor) -> Tensor:
        return x.double() if self._oracle and x.is_floating_point() else x

    def packed(self, weight: PackedWeight, site: OpSite, *, checked: bool = True) -> PackedWeight:
        return weight

    def op(self, name: str, **facts: Any) -> Op:
        return OPS[name].body

    def paged_ops(
        self, spec: AttnSpec | MLASpec, page_size: int, rotary: RopeSpec | None = None, *, normed: bool = False
    ) -> dict[str, Op]:
        names = MLA_OPS if isinstance(spec, MLASpec) else PAGED_OPS
        return {name: OPS[name].body for name in (*names, *([ROPE_PAGED] if rotary else []))}

    def pool(self, spec: PoolSpec, num_pages: int, *, poisoned: bool = True) -> Pool:
        exact = self._oracle and spec.dtype == self.dtype  # numbers of another dtype are rounded to it here too
        pool = Pool(replace(spec, dtype=torch.float64) if exact else spec, num_pages, CPU)
        if poisoned:
            pool.poison(range(num_pages))
        return pool

    def far(self, count: int) -> int:
        return min(count, 8)

    def batch_invariant(self, op: str) -> bool:
        return False

    def takes_codes(self, op: str) -> bool:
        return True

    def state_ops(self, spec: GatedDeltaSpec) -> dict[str, Op]:
        return {name: OPS[name].body for name in STATE_OPS}

    def state_pool(self, spec: StatePoolSpec, num_slots: int, *, poisoned: bool = True) -> StatePool:
        wide = replace(spec, conv_dtype=torch.float64, state_dtype=torch.float64)
        pool = StatePool(wide if self._oracle else spec, num_slots, CPU)
        if poisoned:
            pool.poison(range(num_slots))
        return pool

    def ranks(
        self,
        program: Program,
        size: int,
        args: Mapping[str, Any],
        *,
        dead: tuple[int, ...] = (),
        timeout: float = COLLECTIVE_LIMIT,
    ) -> dict[int, Mapping[str, Tensor]]:
        return run_reference(program, args, size=size, dtype=self.dtype, seed=self.seed, oracle=self._oracle)

    def engine_tokens(self, prompts: Sequence[str], **settings: Any) -> list[list[int]]:
        return []


class DeviceEnv(Env):
    """The kernels that selection gives, on the device. `bound` is what it gave."""

    rank_host: RankHost  # the suite's, for cases over several ranks

    def __init__(
        self, dtype: torch.dtype, seed: int, runtime: DeviceRuntime, make_table: Callable[[int], OpTable]
    ) -> None:
        super().__init__(dtype, seed)
        self.device, self.runtime, self._make_table = runtime.torch_device, runtime, make_table
        self._table = make_table(0)
        self.bound: dict[str, BoundOp] = {}

    def place(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def packed(self, weight: PackedWeight, site: OpSite, *, checked: bool = True) -> PackedWeight:
        bound = self._table.bind(site)
        if bound.pack is None:
            return weight
        if checked:
            check_packing(weight, bound.pack, bound.unpack)
        return bound.pack(weight)  # type: ignore[no-any-return]

    def op(self, name: str, **facts: Any) -> Op:
        return self._remember([self._table.bind(self.site(name, **facts))])[name]

    def paged_ops(
        self, spec: AttnSpec | MLASpec, page_size: int, rotary: RopeSpec | None = None, *, normed: bool = False
    ) -> dict[str, Op]:
        self._table = self._make_table(page_size)
        like, names = (spec.latent, MLA_OPS) if isinstance(spec, MLASpec) else (spec, PAGED_OPS)
        dims = {"Hq": like.num_heads, "Hk": like.num_kv_heads, "D": like.head_dim}
        sites = [self.site(name, spec=spec, dims=dims) for name in names]
        if rotary is not None:
            turned = self.site("rope.apply", spec=rotary, dims={"D": like.head_dim})
            norms = [self.site("norm.rms", dims={"M": like.head_dim})] if normed else []
            sites.append(replace(sites[0], op=ROPE_PAGED, parts=(*norms, turned, sites[0])))
        return self._remember(self._table.bind_group(sites).values())

    def pool(self, spec: PoolSpec, num_pages: int, *, poisoned: bool = True) -> Pool:
        pool = self.runtime.alloc_pool(replace(spec, layout=self._table.pool_layout()), num_pages)
        if poisoned:
            pool.poison(range(num_pages))
        return pool

    def far(self, count: int) -> int:
        """Raises NoRoomError where the device is emulated in copies (the fact `emulated_copies`) that the host has no room for."""
        need = FAR_BYTES * int(self.runtime.infos[0].facts.get("emulated_copies", 0))
        if need and need > (free := self.runtime.memory().free):
            raise NoRoomError(f"its emulation takes {need >> 30} GiB of memory, and {free >> 30} are free")
        return count

    def batch_invariant(self, op: str) -> bool:
        kernels = self.bound[op].kernels
        return bool(kernels) and all("batch_invariant" in kernel.features for kernel in kernels)

    def takes_codes(self, op: str) -> bool:
        return all("takes_codes" in kernel.features for kernel in self.bound[op].kernels)  # bodies do

    def state_ops(self, spec: GatedDeltaSpec) -> dict[str, Op]:
        dims = {"Hk": spec.num_k_heads, "Hv": spec.num_v_heads, "C": spec.conv_dim}
        group = self._table.bind_group([self.site(name, spec=spec, dims=dims) for name in STATE_OPS], pool=STATE)
        return self._remember(group.values())

    def state_pool(self, spec: StatePoolSpec, num_slots: int, *, poisoned: bool = True) -> StatePool:
        layout = self._table.pool_layout(STATE)
        pool = self.runtime.alloc_state_pool(replace(spec, layout=layout), num_slots)
        if poisoned:
            pool.poison(range(num_slots))
        return pool

    def ranks(
        self,
        program: Program,
        size: int,
        args: Mapping[str, Any],
        *,
        dead: tuple[int, ...] = (),
        timeout: float = COLLECTIVE_LIMIT,
    ) -> dict[int, Mapping[str, Tensor]]:
        self._room_for(size)
        return self.rank_host.run(
            program, args, size=size, dtype=self.dtype, seed=self.seed, dead=dead, timeout=timeout
        )

    def engine_tokens(self, prompts: Sequence[str], **settings: Any) -> list[list[int]]:
        from sglang_core import Engine  # all of the engine: for this only

        self._room_for(settings.get("tp_size", 1))
        label = self.runtime.infos[0].label
        common: dict[str, Any] = {"model_path": "demo", "device": label, "dtype": "float32", "max_total_tokens": 2048}
        greedy = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
        with torch.inference_mode(False), Engine(**common, **settings) as engine:
            return [answer["output_ids"] for answer in engine.generate(list(prompts), greedy)]

    def _room_for(self, num_ranks: int) -> None:
        """Raises NoRoomError where there are fewer devices than ranks."""
        try:
            self.rank_host.place(num_ranks)
        except DeviceError as e:
            raise NoRoomError(str(e)) from e

    def site(self, name: str, **facts: Any) -> OpSite:
        return OpSite(op=name, layer="Conformance", dtype=str(self.dtype).removeprefix("torch."), **facts)

    def _remember(self, bound: Sequence[BoundOp] | Any) -> dict[str, Op]:
        found = {b.site.op: b for b in bound}
        self.bound |= found
        return {name: guarded(name, b.fn) for name, b in found.items()}
