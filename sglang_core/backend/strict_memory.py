"""Memory of the `strict` device: guards around what a step may write, a look at what it wrote, and pools that move.

What tracing and version counters see is what PyTorch is told of. A kernel that is handed a pointer is not so polite: here bytes are
compared. A pool's leaves lie between guards; after a step only the slots that its batch names differ (and page 0, which is scratch),
and the leaves move elsewhere, as a compiler that donates them moves them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.pool import Pool
from sglang_core.backend.state_pool import StatePool
from sglang_core.backend.strict_trace import StrictError
from sglang_core.backend.tensor_tree import leaves

AnyPool = Pool | StatePool
GUARD = 256  # elements before and after; a multiple of any vector, so that alignment stays
SLOT_NAMES = (".slot_mapping", ".write_slots", ".slots")  # of a batch: int32, where it writes


def poison(t: Tensor) -> Tensor:
    """NaN, or integers that no index and no code should be."""
    if t.dtype.is_floating_point or t.dtype.is_complex:
        return t.fill_(float("nan"))
    return t.fill_(True) if t.dtype is torch.bool else t.fill_(torch.iinfo(t.dtype).min)


def guarded(like: Tensor) -> Tensor:
    """Memory of the same shape and strides, poisoned, between poisoned guards."""
    spans = (step * (size - 1) for size, step in zip(like.size(), like.stride(), strict=True))
    count = 1 + sum(spans) if like.numel() else 0  # not of its storage, which may have guards of its own
    whole = poison(torch.empty(count + 2 * GUARD, dtype=like.dtype, device=like.device))
    return whole.as_strided(like.size(), like.stride(), GUARD)


def guards_hold(t: Tensor) -> bool:
    """Whether nobody wrote next to what `guarded` made."""
    count = t.untyped_storage().nbytes() // t.element_size()
    whole = t.as_strided((count,), (1,), 0)
    return all(same_bytes(side, poison(torch.empty_like(side))) for side in (whole[:GUARD], whole[-GUARD:]))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(as_bytes(a), as_bytes(b)))


def as_bytes(t: Tensor) -> Tensor:
    """[..., bytes of the last dim]; a scalar is [bytes]."""
    t = t.detach()
    if not t.numel():
        return t.new_empty(0, dtype=torch.uint8)
    return (t.reshape(1) if t.dim() == 0 else t).contiguous().view(torch.uint8)


class Pools:
    """The pools of a runtime, looked at around each step."""

    def __init__(self) -> None:
        self._pools: weakref.WeakSet[AnyPool] = weakref.WeakSet()

    def add(self, pool: AnyPool) -> None:
        pool.leaves = [guarded(leaf) for leaf in pool.leaves]
        self._pools.add(pool)

    def constants(self) -> set[int]:
        """ids of what a pool has beside its leaves."""
        return {id(scale) for pool in self._pools if isinstance(pool, Pool) for scale in pool.scales}

    def watch(self, declared: Sequence[Tensor]) -> PoolWatch:
        ids = {id(t) for t in declared}
        return PoolWatch([pool for pool in self._pools if any(id(leaf) in ids for leaf in pool.leaves)])


class PoolWatch:
    """What the pools of one step held before it."""

    def __init__(self, pools: list[AnyPool]) -> None:
        self.pools = pools
        self._before = [[leaf.clone() for leaf in pool.leaves] for pool in pools]

    def check(self, forward_batch: Any) -> None:
        """Raises StrictError where a step wrote to a slot that its batch does not name, or next to a pool."""
        named = list(_named_slots(forward_batch))
        for pool, before in zip(self.pools, self._before, strict=True):
            group = pool.spec.group
            for i, (leaf, old) in enumerate(zip(pool.leaves, before, strict=True)):
                if not guards_hold(leaf):
                    raise StrictError(
                        f"a kernel wrote past the end of leaf {i} of pool {group!r} ({leaf.dtype} {list(leaf.shape)}): an offset is"
                        " computed from the wrong stride, or a slot is beyond the pool"
                    )
                if wrong := sorted(_changed(pool, leaf, old) - _allowed(pool, named)):
                    raise StrictError(
                        f"the step wrote to slot {wrong[0]} of pool {group!r} (leaf {i}, {len(wrong)} slots in all), which no"
                        " slot_mapping or write_slots of its batch names: write new tokens' slots only, and padding to slot 0"
                    )

    def move(self) -> None:
        """Rebind every leaf to new memory, and poison the old: who held one across a step finds NaN."""
        for pool, before in zip(self.pools, self._before, strict=True):
            old = pool.leaves
            pool.leaves = [guarded(leaf).copy_(leaf) for leaf in old]
            for leaf in (*old, *before):
                poison(leaf)


def check_slots(pools: Iterable[AnyPool], forward_batch: Any) -> None:
    """Raises StrictError where a batch names a slot that is in none of the pools: -1 would be the last page."""
    sizes = [_num_slots(pool) for pool in pools]
    for path, slots in _named_slots(forward_batch):
        bad = slots[(slots < 0) | (slots >= max(sizes, default=0))] if sizes else slots[:0]
        if bad.numel():
            raise StrictError(
                f"{path} names slot {int(bad[0])}, and the largest pool has slots 0 to {max(sizes) - 1}; padding writes to slot 0"
                " (a negative index would silently be another page)"
            )


def _named_slots(forward_batch: Any) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in leaves(forward_batch, "forward_batch"):
        if isinstance(leaf, Tensor) and path.endswith(SLOT_NAMES):
            yield path, leaf


def _num_slots(pool: AnyPool) -> int:
    return pool.num_slots if isinstance(pool, StatePool) else pool.num_pages * pool.spec.page_size


def _allowed(pool: AnyPool, named: list[tuple[str, Tensor]]) -> set[int]:
    """Page 0 is scratch."""
    scratch = 1 if isinstance(pool, StatePool) else pool.spec.page_size
    return set(range(scratch)).union(*(slots.flatten().tolist() for _, slots in named))


def _changed(pool: AnyPool, leaf: Tensor, old: Tensor) -> set[int]:
    rows = _num_slots(pool)
    differs = as_bytes(leaf).view(rows, -1) != as_bytes(old).view(rows, -1)
    return set(differs.any(1).nonzero().flatten().tolist())
