"""Steps over a poisoned pool of states, and the ssm ops written the plainest way, in float64, to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_core.backend.state_pool import StatePool, StatePoolSpec
from sglang_core.ops.ssm_plan import GatedDeltaSpec, StateBatch

CPU = torch.device("cpu")
F64 = torch.float64


@dataclass(kw_only=True)
class StateCase:
    """One step: its packed inputs, and the states of its reqs before it (None: a req that starts)."""

    spec: GatedDeltaSpec
    batch: StateBatch
    pool: StatePool
    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    conv_states: list[Tensor | None]
    states: list[Tensor | None]

    @property
    def delta_args(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.g, self.beta

    def rows(self, req: int) -> slice:
        return slice(int(self.batch.cu_extend_cpu[req]), int(self.batch.cu_extend_cpu[req + 1]))


def delta_spec(**changes: object) -> GatedDeltaSpec:
    facts = {"num_k_heads": 2, "num_v_heads": 4, "k_head_dim": 8, "v_head_dim": 6, "conv_width": 4, "scale": 0.3}
    return GatedDeltaSpec(**(facts | changes))  # type: ignore[arg-type]


def state_case(
    reqs: Sequence[tuple[bool, int]],
    *,
    spec: GatedDeltaSpec | None = None,
    dtype: torch.dtype = torch.float32,
    in_place: bool = False,
    static: bool = False,
    padding: tuple[int, int] = (0, 0),
    seed: int = 0,
) -> StateCase:
    """reqs: (has a state, extend) each. Slots are permuted, those that hold no state are NaN, and so are padding's inputs.

    `padding`: tokens and reqs above theirs. Decays are between all and nothing, keys far from unit length.
    """
    g = torch.Generator().manual_seed(seed)
    spec = spec or delta_spec()
    num_reqs, total = len(reqs), sum(extend for _, extend in reqs)
    num_tokens = total + padding[0]
    slots = (torch.randperm(2 * num_reqs, generator=g) + 1).int()
    started = torch.tensor([s for s, _ in reqs], dtype=torch.bool)
    read = torch.where(started, slots[:num_reqs], 0)
    write = torch.where(started, slots[:num_reqs], slots[num_reqs:]) if in_place else slots[num_reqs:]
    pool_spec = StatePoolSpec(
        num_layers=2,
        conv_shape=(spec.conv_width - 1, spec.conv_dim),
        conv_dtype=dtype,
        state_shape=(spec.num_v_heads, spec.k_head_dim, spec.v_head_dim),
    )
    pool = StatePool(pool_spec, 2 * num_reqs + 1, CPU)
    pool.poison(range(pool.num_slots))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=F64)

    conv_states: list[Tensor | None] = []
    states: list[Tensor | None] = []
    for (has_state, _), slot in zip(reqs, read, strict=True):
        conv, state = normal(*pool_spec.conv_shape).to(dtype), normal(*pool_spec.state_shape).float()
        conv_states.append(conv if has_state else None)
        states.append(state if has_state else None)
        if has_state:
            pool.scatter(1, slot[None], conv[None], state[None])

    def tokens(*shape: int) -> Tensor:
        return torch.cat([normal(total, *shape), torch.full((padding[0], *shape), math.nan, dtype=F64)])

    lens = torch.tensor([0] + [extend for _, extend in reqs] + [0] * padding[1])
    return StateCase(
        spec=spec,
        batch=StateBatch(
            cu_extend_cpu=lens.cumsum(0).int(),
            read_slots_cpu=torch.cat([read, torch.zeros(padding[1], dtype=torch.int32)]),
            write_slots_cpu=torch.cat([write, torch.zeros(padding[1], dtype=torch.int32)]),
            num_tokens=num_tokens,
            num_reqs=num_reqs + padding[1],
            max_extend=int(lens.max()),
            static=static,
        ),
        pool=pool,
        x=tokens(spec.conv_dim).to(dtype),
        q=tokens(spec.num_k_heads, spec.k_head_dim).to(dtype),
        k=tokens(spec.num_k_heads, spec.k_head_dim).to(dtype),
        v=tokens(spec.num_v_heads, spec.v_head_dim).to(dtype),
        g=-(tokens(spec.num_v_heads) * 2).exp().float(),
        beta=tokens(spec.num_v_heads).sigmoid().float(),
        conv_states=conv_states,
        states=states,
    )


def naive_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """One req. x: [E, C], weight: [C, W], state: [W - 1, C] -> float64[E, C] and the new state."""
    kept = weight.shape[1] - 1
    before = torch.zeros(kept, x.shape[1], dtype=F64) if state is None else state.double()
    line = torch.cat([before, x.double()])
    y = torch.zeros_like(x, dtype=F64)
    for t in range(x.shape[0]):
        for j in range(kept + 1):
            y[t] += line[t + j] * weight[:, j].double()
        y[t] += 0.0 if bias is None else bias.double()
    return (y * torch.sigmoid(y) if silu else y), line[line.shape[0] - kept :]


def naive_delta(
    spec: GatedDeltaSpec, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One req, token by token and head by head -> float64[E, Hv, Dv] and the new state."""
    s = torch.zeros(spec.num_v_heads, spec.k_head_dim, spec.v_head_dim, dtype=F64)
    s = s if state is None else state.double().clone()
    o = torch.zeros_like(v, dtype=F64)
    for t in range(q.shape[0]):
        for h in range(spec.num_v_heads):
            from_head = h // (spec.num_v_heads // spec.num_k_heads)
            query, key, value = q[t, from_head].double(), k[t, from_head].double(), v[t, h].double()
            if spec.qk_l2norm:
                query, key = (z / torch.sqrt((z * z).sum() + 1e-6) for z in (query, key))
            s[h] *= torch.exp(g[t, h].double())
            s[h] += torch.outer(key, beta[t, h].double() * (value - s[h].T @ key))
            o[t, h] = s[h].T @ query * spec.scale
    return o, s
