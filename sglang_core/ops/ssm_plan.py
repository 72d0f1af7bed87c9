"""What a step does to recurrent states (`GatedDeltaSpec`, `StateBatch`), and the reference plan for it.

A slot of a state pool holds one state: what all tokens up to one position of a req have left behind, in every layer. A step
reads a req's state from one slot and writes it to another, or to the same. Where they differ the old state stays: a rejected
draft rolls back, a prefix is kept for other reqs, and a step that is run twice gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sglang_core.ops.registry import op

CHUNK = 64  # tokens that the chunked form takes at once


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedDeltaSpec:
    """One kind of gated delta net layer, for this rank. Hashable; the question that kernel selection asks.

    Value head h reads key head h // (num_v_heads / num_k_heads).
    """

    num_k_heads: int
    num_v_heads: int
    k_head_dim: int
    v_head_dim: int
    conv_width: int  # taps of the convolution before it
    scale: float  # multiplies queries
    qk_l2norm: bool = True  # queries and keys are divided by their length first

    def __post_init__(self) -> None:
        assert self.num_v_heads % self.num_k_heads == 0, (
            f"{self.num_v_heads} value heads over {self.num_k_heads} key heads"
        )
        assert self.conv_width >= 2, f"a convolution of {self.conv_width} taps keeps no state"

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values side by side."""
        return 2 * self.num_k_heads * self.k_head_dim + self.num_v_heads * self.v_head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBatch:
    """Which states one step reads and writes: int32 on the host.

    Slot 0 is scratch. Who reads it has no state yet and starts from zeros. Reqs that only fill a bucket have extend 0, read
    slot 0 and write to it; no other slot is written twice, nor read by another req than the one that writes it. Tokens that
    only fill it come last.
    """

    cu_extend_cpu: Tensor  # int32[R + 1]: req r's new tokens are rows [cu[r], cu[r + 1])
    read_slots_cpu: Tensor  # int32[R]
    write_slots_cpu: Tensor  # int32[R]
    num_tokens: int  # T
    num_reqs: int  # R
    max_extend: int  # no req extends by more
    static: bool = False  # sizes are a bucket's: the plan's shapes may depend on them and on nothing else


@dataclass(frozen=True, kw_only=True, slots=True)
class StatePlanStatic:
    """The part of a plan that joins the compile key."""

    num_tokens: int
    num_reqs: int
    max_extend: int
    active: tuple[int, ...]  # per chunk of CHUNK tokens: how many of the reqs, the longest first, reach into it


@dataclass(frozen=True, kw_only=True, slots=True)
class StatePlan:
    """`ssm.plan`'s result: the batch on the device. May alias the batch's tensors.

    The first `static.active[0]` reqs of `order` take the chunked form. The others extend by a token or none and take the
    recurrent one.
    """

    static: StatePlanStatic
    cu_extend: Tensor  # int32[R + 1]
    read_slots: Tensor  # int32[R]
    write_slots: Tensor  # int32[R]
    order: Tensor  # int32[R]: the reqs, the longest extend first

    def buffers(self) -> Iterator[Tensor]:
        """Every tensor, in a fixed order."""
        yield from (self.cu_extend, self.read_slots, self.write_slots, self.order)


@op("ssm.plan", host=True)
def ssm_plan(spec: GatedDeltaSpec, batch: StateBatch, device: torch.device, out: StatePlan | None = None) -> StatePlan:
    """Plan one step of the ssm ops for every layer of this spec. Host work, before the step.

    A req takes the chunked form if it extends by more than one token, whatever its neighbours do; in a bucket, where any may.
    With `out`, an earlier plan of the same bucket, its buffers are filled in place and it is returned.
    """
    extend = np.diff(batch.cu_extend_cpu.numpy())
    plan = StatePlan(
        static=StatePlanStatic(
            num_tokens=batch.num_tokens,
            num_reqs=batch.num_reqs,
            max_extend=batch.max_extend,
            active=_active(batch, extend),
        ),
        cu_extend=batch.cu_extend_cpu.to(device),
        read_slots=batch.read_slots_cpu.to(device),
        write_slots=batch.write_slots_cpu.to(device),
        order=torch.from_numpy(np.argsort(-extend, kind="stable").astype(np.int32)).to(device),
    )
    if out is None:
        return plan
    assert out.static == plan.static, f"plan of another bucket: {plan.static} into {out.static}"
    for old, new in zip(out.buffers(), plan.buffers(), strict=True):
        old.copy_(new)
    return out


def _active(batch: StateBatch, extend: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> tuple[int, ...]:
    """Of a bucket: as many as can be, by its number of tokens. Empty where no req extends by more than one token."""
    longest = batch.max_extend if batch.static else int(extend.max(initial=0))
    if longest <= 1:
        return ()
    starts = range(0, longest, CHUNK)
    if batch.static:
        return tuple(min(batch.num_reqs, batch.num_tokens // (start + 1)) for start in starts)
    return tuple(int((extend > max(start, 1)).sum()) for start in starts)
