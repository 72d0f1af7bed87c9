"""Steps over a pool of states: slots in no order, and NaN in those that nobody wrote."""

from __future__ import annotations

import torch

from sglang_core.api import StatePool, StatePoolSpec
from sglang_core.api.ops import OPS, GatedDeltaSpec, StateBatch, StatePlan

CPU = torch.device("cpu")
LAYER = 1
Reqs = list[tuple[bool, int]]  # (has a state, new tokens) each
DECODE: Reqs = [(True, 1), (False, 1), (True, 0), (True, 1)]
MIXED: Reqs = [(True, 1), (False, 70), (True, 128), (True, 3), (False, 0), (True, 9)]


def make_spec(
    k_heads: int, v_heads: int, k_dim: int, v_dim: int, *, l2norm: bool = True, taps: int = 4
) -> GatedDeltaSpec:
    return GatedDeltaSpec(
        num_k_heads=k_heads,
        num_v_heads=v_heads,
        k_head_dim=k_dim,
        v_head_dim=v_dim,
        conv_width=taps,
        scale=k_dim**-0.5,
        qk_l2norm=l2norm,
    )


def make_step(
    spec: GatedDeltaSpec, reqs: Reqs, dtype: torch.dtype, *, in_place: bool = False, padding: int = 0
) -> tuple[StatePool, StatePlan, int]:
    """A pool, the plan, and how many tokens there are. `padding`: so many tokens more are of no req."""
    count, generator = len(reqs), torch.Generator().manual_seed(7)
    pool_spec = StatePoolSpec(
        num_layers=LAYER + 1,
        conv_shape=(spec.conv_width - 1, spec.conv_dim),
        conv_dtype=dtype,
        state_shape=(spec.num_v_heads, spec.k_head_dim, spec.v_head_dim),
    )
    pool = StatePool(pool_spec, 2 * count + 1, CPU)
    pool.poison(range(pool.num_slots))
    slots = torch.randperm(2 * count, generator=generator).int() + 1
    started = torch.tensor([has for has, _ in reqs])
    read = torch.where(started, slots[:count], 0)
    write = torch.where(started, slots[:count], slots[count:]) if in_place else slots[count:]
    conv = torch.randn(count, *pool_spec.conv_shape, generator=generator)
    state = torch.randn(count, *pool_spec.state_shape, generator=generator)
    pool.scatter(LAYER, read, conv, state)
    pool.poison([0])
    extends = torch.tensor([0, *(n for _, n in reqs)])
    total = int(extends.sum()) + padding
    batch = StateBatch(
        cu_extend_cpu=extends.cumsum(0).int(),
        read_slots_cpu=read,
        write_slots_cpu=write,
        num_tokens=total,
        num_reqs=count,
        max_extend=int(extends.max()),
    )
    return pool, OPS["ssm.plan"].body(spec, batch, CPU), total
