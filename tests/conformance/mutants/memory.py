"""Mistakes in how memory is reached: strides, places past 32 and 16 bits, inputs that are written to."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sglang_core.ops.weight import PackedWeight
from tests.conformance.mutants.bodies import Mutant, body


def as_if_dense(op: str, *args: Any, **kwargs: Any) -> Any:
    """Takes its inputs for contiguous, wherever they begin."""
    return body(op, *(_dense(arg) if isinstance(arg, Tensor) else arg for arg in args), **kwargs)


def _dense(x: Tensor) -> Tensor:
    strides = torch.empty(x.shape, device="meta").stride()
    return x if x.is_contiguous() else x.as_strided(x.shape, strides)


attends_as_if_dense = partial(as_if_dense, "attn.paged")
attends_to_latents_as_if_dense = partial(as_if_dense, "attn.mla_paged")
attends_ragged_as_if_dense = partial(as_if_dense, "attn.ragged")
writes_as_if_dense = partial(as_if_dense, "kv.write")
multiplies_as_if_dense = partial(as_if_dense, "gemm.linear")
normalises_as_if_dense = partial(as_if_dense, "norm.rms")
rotates_as_if_dense = partial(as_if_dense, "rope.apply")
gates_as_if_dense = partial(as_if_dense, "act.gated")
routes_as_if_dense = partial(as_if_dense, "moe.route")
adapts_as_if_dense = partial(as_if_dense, "lora.apply")
convolves_as_if_dense = partial(as_if_dense, "ssm.causal_conv1d")
opens_as_if_dense = partial(as_if_dense, "ssm.gates")
normalises_gated_as_if_dense = partial(as_if_dense, "norm.rms_gated")
masks_as_if_dense = partial(as_if_dense, "logits.mask")


def wraps_rows(op: str, *args: Any, **kwargs: Any) -> Any:
    """Counts rows in 16 bits: those past them stay as they were allocated."""
    y = body(op, *args, **kwargs)
    y[1 << 16 :] = 0
    return y


normalises_65536_rows = partial(wraps_rows, "norm.layer")
gates_65536_rows = partial(wraps_rows, "act.gated")
looks_up_65536_rows = partial(wraps_rows, "embed.lookup")


def wrapped(index: Tensor, width: int) -> Tensor:
    """Where a place leads to whose index was multiplied by the width in int32: elements, back to an index."""
    return ((index.long() * width + 2**31) % 2**32 - 2**31) // width


class _In32Bits:
    """A pool that counts elements in int32, as a kernel does that multiplies a slot by its size before it widens."""

    def __init__(self, pool: Any) -> None:
        self._pool, self.spec, self.num_pages = pool, pool.spec, pool.num_pages

    def _slots(self, slots: Tensor) -> Tensor:
        total = self.num_pages * self.spec.page_size
        return (wrapped(slots, self.spec.num_kv_heads * self.spec.head_dim) % total).int()

    def scatter(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self._pool.scatter(layer, self._slots(slots), k, v)

    def gather_heads(self, layer: int, slots: Tensor, dtype: torch.dtype) -> Any:
        return self._pool.gather_heads(layer, self._slots(slots), dtype)


def with_pool_in_32_bits(op: str, at: int, *args: Any, **kwargs: Any) -> Any:
    return body(op, *args[:at], _In32Bits(args[at]), *args[at + 1 :], **kwargs)


writes_in_32_bits = partial(with_pool_in_32_bits, "kv.write", 2)


def multiplies_slots_in_32_bits(
    q: Tensor, k: Any, v: Any, pool: Any, layer: int, spec: Any, plan: Any, **kwargs: Any
) -> Any:
    """Writes where it should."""
    pool.scatter(layer, plan.slot_mapping, k, v)
    return with_pool_in_32_bits("attn.paged", 3, q, None, None, pool, layer, spec, plan, **kwargs)


def reads_latents_in_32_bits(
    q: Tensor, q_pe: Tensor, c_kv: Tensor, k_pe: Tensor, pool: Any, layer: int, spec: Any, plan: Any, **kwargs: Any
) -> Any:
    pool.scatter(layer, plan.slot_mapping, c_kv[:, None], k_pe[:, None])
    return with_pool_in_32_bits("attn.mla_paged", 4, q, q_pe, None, None, pool, layer, spec, plan, **kwargs)


def looks_up_in_32_bits(ids: Tensor, weight: Tensor, start: int = 0) -> Tensor:
    past = ids.long() * weight.shape[1] >= 2**31
    place = torch.where(past, wrapped(ids, weight.shape[1]) % len(weight), ids)
    return body("embed.lookup", place, weight, start)  # type: ignore[no-any-return]


def adapts_in_32_bits(y: Tensor, x: Tensor, a: Tensor, b: Tensor, own: Tensor, *args: Any) -> Tensor:
    place = (wrapped(own, a[0].numel()) % len(a)).int()
    return body("lora.apply", y, x, a, b, torch.where(own < 0, own, place), *args)  # type: ignore[no-any-return]


def reads_states_in_32_bits(*args: Any) -> Tensor:
    pool, plan = args[5], args[8]
    slots = wrapped(plan.read_slots, pool.state(0)[0].numel()) % pool.num_slots
    return body("ssm.gated_delta_rule", *args[:8], replace(plan, read_slots=slots.int()))  # type: ignore[no-any-return]


def finds_experts_in_32_bits(
    x: Tensor, w13: PackedWeight, w2: PackedWeight, weights: Tensor, ids: Tensor, *args: Any
) -> Any:
    place = wrapped(ids, w13.out_features * w13.in_features) % len(w13["weight"])
    return body("moe.fused", x, w13, w2, weights, place.int(), *args)


def adds_in_place(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    """The new residual is where the old one was, which somebody else may hold."""
    y, total = body("norm.add_rms", x, residual, weight, eps)
    return y, residual.copy_(total)


def rotates_in_place(q: Tensor, k: Tensor, *args: Any) -> Any:
    new_q, new_k = body("rope.apply", q, k, *args)
    return q.copy_(new_q), k.copy_(new_k)


PAST, SLICED, MANY = "past 2^31", "sliced", "70000 rows"
PARTIALS = {name: value for name, value in globals().items() if isinstance(value, partial)}
MUTANTS = {
    **{name: Mutant(fn.args[0], SLICED) for name, fn in PARTIALS.items() if fn.func is as_if_dense},
    **{name: Mutant(fn.args[0], MANY) for name, fn in PARTIALS.items() if fn.func is wraps_rows},
    "writes_in_32_bits": Mutant("kv.write", PAST),
    "multiplies_slots_in_32_bits": Mutant("attn.paged", PAST, alone=False),
    "reads_latents_in_32_bits": Mutant("attn.mla_paged", PAST, alone=False),
    "looks_up_in_32_bits": Mutant("embed.lookup", PAST),
    "adapts_in_32_bits": Mutant("lora.apply", PAST),
    "reads_states_in_32_bits": Mutant("ssm.gated_delta_rule", PAST),
    "finds_experts_in_32_bits": Mutant("moe.fused", PAST, alone=False),
    "adds_in_place": Mutant("norm.add_rms"),
    "rotates_in_place": Mutant("rope.apply"),
}
