"""Mistakes that only a row's neighbours show: padding that is looked at, and results that depend on who else is there."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.conformance.mutants.bodies import Mutant, body

INVARIANT = frozenset({"batch_invariant"})
FEW = 4  # rows


def adds_nothing_of_padding(op: str, at: int, *args: Any, **kwargs: Any) -> Any:
    """Everybody's result takes the sum of all rows, times zero: NaN where one row is."""
    nothing = (args[at].float() * 0.0).sum()
    return _each(body(op, *args, **kwargs), lambda y: y + nothing.to(y.dtype))


def another_order_for_many(op: str, *args: Any, **kwargs: Any) -> Any:
    """An ulp of float32 more where there are many rows, as when sums take another order; and it says `batch_invariant`."""
    many = args[0].shape[0] > FEW
    return _each(body(op, *args, **kwargs), lambda y: (y.float() * (1 + 2.0**-22)).to(y.dtype) if many else y)


def _each(result: Any, change: Any) -> Any:
    if isinstance(result, Tensor):
        return change(result)
    return tuple(change(y) if isinstance(y, Tensor) and y.is_floating_point() else y for y in result)


linear_touches_padding = partial(adds_nothing_of_padding, "gemm.linear", 0)
grouped_touches_padding = partial(adds_nothing_of_padding, "gemm.grouped", 0)
experts_touch_padding = partial(adds_nothing_of_padding, "moe.fused", 0)
route_touches_padding = partial(adds_nothing_of_padding, "moe.route", 0)
norm_touches_padding = partial(adds_nothing_of_padding, "norm.rms", 0)
gate_touches_padding = partial(adds_nothing_of_padding, "act.gated", 0)
rope_touches_padding = partial(adds_nothing_of_padding, "rope.apply", 0)
adapters_touch_padding = partial(adds_nothing_of_padding, "lora.apply", 1)
attention_touches_padding = partial(adds_nothing_of_padding, "attn.paged", 0)
latents_touch_padding = partial(adds_nothing_of_padding, "attn.mla_paged", 0)
gates_touch_padding = partial(adds_nothing_of_padding, "ssm.gates", 0)
gated_norm_touches_padding = partial(adds_nothing_of_padding, "norm.rms_gated", 1)
conv_touches_padding = partial(adds_nothing_of_padding, "ssm.causal_conv1d", 0)
linear_says_invariant = partial(another_order_for_many, "gemm.linear")
norm_says_invariant = partial(another_order_for_many, "norm.rms")
experts_say_invariant = partial(another_order_for_many, "moe.fused")
sampling_says_invariant = partial(another_order_for_many, "sample.sample")
attention_says_invariant = partial(another_order_for_many, "attn.paged")
latents_say_invariant = partial(another_order_for_many, "attn.mla_paged")
delta_says_invariant = partial(another_order_for_many, "ssm.gated_delta_rule")


def one_scale_a_batch(x: Tensor, w: Any, bias: Tensor | None = None) -> Tensor:
    """Quantises activations by the largest of the whole batch."""
    if w.fmt not in ("fp8.token_channel", "int8.token_channel") or not x.numel():
        return body("gemm.linear", x, w, bias)  # type: ignore[no-any-return]
    scale = x.float().abs().amax().clamp(min=1e-12) / (448.0 if w.fmt.startswith("fp8") else 127.0)
    code = x.float() / scale
    code = code.to(torch.float8_e4m3fn).float() if w.fmt.startswith("fp8") else code.round()
    y = code * scale @ body("quant.dequantize", w).mT
    return (y if bias is None else y + bias).to(x.dtype)


PADDED, TOGETHER = "padded or not", "alone and together"
PARTIALS = {name: value for name, value in globals().items() if isinstance(value, partial)}
MUTANTS = {
    **{name: Mutant(fn.args[0], PADDED) for name, fn in PARTIALS.items() if fn.func is adds_nothing_of_padding},
    **{
        name: Mutant(fn.args[0], TOGETHER, INVARIANT, alone=name != "delta_says_invariant")
        for name, fn in PARTIALS.items()
        if fn.func is another_order_for_many
    },
    "grouped_touches_padding": Mutant("gemm.grouped"),  # rows of no group show it, too
    "one_scale_a_batch": Mutant("gemm.linear"),
}
