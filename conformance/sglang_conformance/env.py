"""`Env`: where a case runs. The same seed gives the same numbers in each of the three."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.interface import DeviceRuntime
from sglang_core.backend.kernel import OpSite
from sglang_core.backend.pool import Pool, PoolSpec
from sglang_core.backend.selection import BoundOp, OpTable
from sglang_core.ops import OPS
from sglang_core.ops.attention import AttnSpec
from sglang_core.ops.gemm import dense
from sglang_core.ops.mla import MLASpec
from sglang_core.ops.weight import PackedWeight

CPU = torch.device("cpu")
Op = Callable[..., Any]
PAGED_OPS = ("attn.paged", "attn.plan", "kv.write")
MLA_OPS = ("attn.mla_paged", "attn.mla_plan", "kv.write_mla")


class Env(ABC):
    """What a case is given: seeded numbers, and pools, weights and ops of one device."""

    device: torch.device

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype = dtype
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

    @abstractmethod
    def place(self, x: Tensor) -> Tensor:
        """A host tensor, where and as this env computes."""

    @abstractmethod
    def weight(self, rows: int, columns: int, site: OpSite) -> PackedWeight:
        """A random dense matrix as the kernel at `site` wants it."""

    @abstractmethod
    def experts(self, num: int, rows: int, columns: int, site: OpSite) -> PackedWeight:
        """A stack of random dense matrices as the kernel at `site` wants it."""

    @abstractmethod
    def op(self, name: str, **facts: Any) -> Op:
        """The op, bound at a site with these facts (spec, dims, fmt)."""

    @abstractmethod
    def paged_ops(self, spec: AttnSpec | MLASpec, page_size: int) -> dict[str, Op]:
        """The ops that share a KV pool; of a MLASpec, a pool of latents."""

    @abstractmethod
    def pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        """A pool full of NaN."""


class BodyEnv(Env):
    """The op bodies on the host, in the case's dtype; or, as the oracle, in float64 from inputs rounded to that dtype."""

    device = CPU

    def __init__(self, dtype: torch.dtype, seed: int, *, oracle: bool = False) -> None:
        super().__init__(dtype, seed)
        self._oracle = oracle

    def place(self, x: Tensor) -> Tensor:
        return x.double() if self._oracle and x.is_floating_point() else x

    def weight(self, rows: int, columns: int, site: OpSite) -> PackedWeight:
        return dense(self.normal(rows, columns))

    def experts(self, num: int, rows: int, columns: int, site: OpSite) -> PackedWeight:
        return dense(self.normal(num, rows, columns))

    def op(self, name: str, **facts: Any) -> Op:
        return OPS[name].body

    def paged_ops(self, spec: AttnSpec | MLASpec, page_size: int) -> dict[str, Op]:
        return {name: OPS[name].body for name in (MLA_OPS if isinstance(spec, MLASpec) else PAGED_OPS)}

    def pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        pool = Pool(replace(spec, dtype=torch.float64) if self._oracle else spec, num_pages, CPU)
        pool.poison(range(num_pages))
        return pool


class DeviceEnv(Env):
    """The kernels that selection gives, on the device. `bound` is what it gave."""

    def __init__(
        self, dtype: torch.dtype, seed: int, runtime: DeviceRuntime, make_table: Callable[[int], OpTable]
    ) -> None:
        super().__init__(dtype, seed)
        self.device, self._runtime, self._make_table = runtime.torch_device, runtime, make_table
        self._table = make_table(0)
        self.bound: dict[str, BoundOp] = {}

    def place(self, x: Tensor) -> Tensor:
        return x.to(self.device)

    def weight(self, rows: int, columns: int, site: OpSite) -> PackedWeight:
        return self._packed(dense(self.normal(rows, columns)), site)

    def experts(self, num: int, rows: int, columns: int, site: OpSite) -> PackedWeight:
        return self._packed(dense(self.normal(num, rows, columns)), site)

    def _packed(self, weight: PackedWeight, site: OpSite) -> PackedWeight:
        pack = self._table.bind(site).pack
        return weight if pack is None else pack(weight)  # type: ignore[no-any-return]

    def op(self, name: str, **facts: Any) -> Op:
        return self._remember([self._table.bind(self.site(name, **facts))])[name]

    def paged_ops(self, spec: AttnSpec | MLASpec, page_size: int) -> dict[str, Op]:
        self._table = self._make_table(page_size)
        like, names = (spec.latent, MLA_OPS) if isinstance(spec, MLASpec) else (spec, PAGED_OPS)
        dims = {"Hq": like.num_heads, "Hk": like.num_kv_heads, "D": like.head_dim}
        group = self._table.bind_group([self.site(name, spec=spec, dims=dims) for name in names])
        return self._remember(group.values())

    def pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        pool = self._runtime.alloc_pool(replace(spec, layout=self._table.pool_layout()), num_pages)
        pool.poison(range(num_pages))
        return pool

    def site(self, name: str, **facts: Any) -> OpSite:
        return OpSite(op=name, layer="Conformance", dtype=str(self.dtype).removeprefix("torch."), **facts)

    def _remember(self, bound: Sequence[BoundOp] | Any) -> dict[str, Op]:
        found = {b.site.op: b for b in bound}
        self.bound |= found
        return {name: b.fn for name, b in found.items()}
