"""Recurrent states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.conformance.mutants.bodies import Mutant, body


def _delta(args: tuple[Any, ...], **changes: Any) -> Tensor:
    """The body with some of its arguments changed, by name."""
    names = ("q", "k", "v", "g", "beta", "pool", "layer", "spec", "plan")
    return body("ssm.gated_delta_rule", **(dict(zip(names, args, strict=True)) | changes))  # type: ignore[no-any-return]


def delta_without_decay(*args: Any) -> Tensor:
    return _delta(args, g=args[3] * 0)


def delta_decays_after_reading(*args: Any) -> Tensor:
    """Each token's decay comes one token late."""
    return _delta(args, g=torch.cat([args[3][:1] * 0, args[3][:-1]]))


def delta_deals_key_heads_out(*args: Any) -> Tensor:
    """Value head h reads key head h % Hk."""
    heads = torch.arange(args[7].num_v_heads) % args[7].num_k_heads
    return _delta(args, q=args[0][:, heads], k=args[1][:, heads])


def delta_forgets_the_scale(*args: Any) -> Tensor:
    return _delta(args, spec=replace(args[7], scale=1.0))


def delta_keeps_lengths(*args: Any) -> Tensor:
    return _delta(args, spec=replace(args[7], qk_l2norm=False))


def delta_reads_scratch(*args: Any) -> Tensor:
    """Takes what slot 0 holds for a state: written with ones here, so that it fails by its numbers."""
    pool, layer, plan = args[5], args[6], args[8]
    spare = pool.num_slots - 1
    kept = pool.state(layer)[spare].clone()
    pool.state(layer)[spare] = 1.0
    o = _delta(args, plan=replace(plan, read_slots=torch.where(plan.read_slots > 0, plan.read_slots, spare)))
    if not bool((plan.write_slots == spare).any()):
        pool.state(layer)[spare] = kept
    return o


def delta_forgets_states(*args: Any) -> Tensor:
    return _delta(args, plan=replace(args[8], read_slots=args[8].read_slots * 0))


def delta_writes_where_it_read(*args: Any) -> Tensor:
    plan = args[8]
    return _delta(
        args, plan=replace(plan, write_slots=torch.where(plan.read_slots > 0, plan.read_slots, plan.write_slots))
    )


def delta_state_in_half(*args: Any) -> Tensor:
    o = _delta(args)
    state, slots = args[5].state(args[6]), args[8].write_slots
    state[slots] = state[slots].bfloat16().float()
    return o


def delta_overflows(*args: Any) -> Tensor:
    """Divides by products of decays that have become zero: 0 / 0 where much decays."""
    lost = args[3].cumsum(0).exp() == 0
    return torch.where(lost[..., None], torch.nan, _delta(args)).to(args[2].dtype)


def conv_backwards(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return body("ssm.causal_conv1d", x, weight.flip(1), *args, **kwargs)  # type: ignore[no-any-return]


def conv_without_activation(*args: Any, activation: str | None = None) -> Tensor:
    return body("ssm.causal_conv1d", *args)  # type: ignore[no-any-return]


def conv_forgets_bias(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    return body("ssm.causal_conv1d", x, weight, None, *args, **kwargs)  # type: ignore[no-any-return]


def conv_forgets_states(*args: Any, **kwargs: Any) -> Tensor:
    plan = replace(args[5], read_slots=args[5].read_slots * 0)
    return body("ssm.causal_conv1d", *args[:5], plan, **kwargs)  # type: ignore[no-any-return]


def conv_keeps_newest_first(*args: Any, **kwargs: Any) -> Tensor:
    y = body("ssm.causal_conv1d", *args, **kwargs)
    tail, slots = args[3].conv(args[4]), args[5].write_slots
    tail[slots] = tail[slots].flip(1)
    return y  # type: ignore[no-any-return]


def state_plan_without_the_last_req(spec: Any, batch: Any, device: torch.device, out: Any = None) -> Any:
    plan = body("ssm.plan", spec, batch, device, out)
    return replace(plan, cu_extend=torch.cat([plan.cu_extend[:-1], plan.cu_extend[-2:-1]]))


def delta_skips_reqs_without_tokens(*args: Any) -> Tensor:
    """Their states are not copied."""
    pool, layer, plan = args[5], args[6], args[8]
    idle = (plan.cu_extend.diff() == 0) & (plan.read_slots > 0)
    before = pool.state(layer)[plan.write_slots].clone()
    o = _delta(args)
    state = pool.state(layer)
    state[plan.write_slots] = torch.where(idle[:, None, None, None], before, state[plan.write_slots])
    return o


def gates_of_the_other(b: Tensor, a: Tensor, *args: Any) -> Any:
    return body("ssm.gates", a, b, *args)


def gates_without_bias(b: Tensor, a: Tensor, rate: Tensor, dt_bias: Tensor) -> Any:
    return body("ssm.gates", b, a, rate, dt_bias * 0)


def gates_deal_heads_out(b: Tensor, a: Tensor, *args: Any) -> Any:
    """Takes what is by key head for what is by place within one."""
    return body("ssm.gates", b.mT.reshape(b.shape), a.mT.reshape(a.shape), *args)


def gates_in_the_dtype(b: Tensor, a: Tensor, rate: Tensor, dt_bias: Tensor) -> Any:
    g, beta = body("ssm.gates", b, a, rate, dt_bias)
    return g.to(a.dtype).float(), beta


def softplus_by_its_name(b: Tensor, a: Tensor, rate: Tensor, dt_bias: Tensor) -> Any:
    """log(1 + exp(a)) as it is written: nothing is left of a small exp(a)."""
    _, beta = body("ssm.gates", b, a, rate, dt_bias)
    a = a.float().flatten(1) + dt_bias
    return rate * torch.where(a > 20, a, (1 + a.clamp(max=20).exp()).log()), beta


def softplus_overflows(b: Tensor, a: Tensor, rate: Tensor, dt_bias: Tensor) -> Any:
    _, beta = body("ssm.gates", b, a, rate, dt_bias)
    return rate * (a.float().flatten(1) + dt_bias).exp().log1p(), beta


MUTANTS = {
    "gates_of_the_other": Mutant("ssm.gates"),
    "gates_without_bias": Mutant("ssm.gates"),
    "gates_deal_heads_out": Mutant("ssm.gates"),
    "gates_in_the_dtype": Mutant("ssm.gates"),
    "softplus_by_its_name": Mutant("ssm.gates", "slow decays"),
    "softplus_overflows": Mutant("ssm.gates", "large gates"),
    "delta_without_decay": Mutant("ssm.gated_delta_rule"),
    "delta_decays_after_reading": Mutant("ssm.gated_delta_rule"),
    "delta_deals_key_heads_out": Mutant("ssm.gated_delta_rule"),
    "delta_forgets_the_scale": Mutant("ssm.gated_delta_rule"),
    "delta_keeps_lengths": Mutant("ssm.gated_delta_rule"),
    "delta_reads_scratch": Mutant("ssm.gated_delta_rule"),
    "delta_forgets_states": Mutant("ssm.gated_delta_rule"),
    "delta_writes_where_it_read": Mutant("ssm.gated_delta_rule"),
    "delta_state_in_half": Mutant("ssm.gated_delta_rule"),
    "delta_overflows": Mutant("ssm.gated_delta_rule"),
    "conv_backwards": Mutant("ssm.causal_conv1d"),
    "conv_without_activation": Mutant("ssm.causal_conv1d"),
    "conv_forgets_bias": Mutant("ssm.causal_conv1d"),
    "conv_forgets_states": Mutant("ssm.causal_conv1d"),
    "conv_keeps_newest_first": Mutant("ssm.causal_conv1d"),
    "state_plan_without_the_last_req": Mutant("ssm.plan"),
    "delta_skips_reqs_without_tokens": Mutant("ssm.gated_delta_rule", "tokens"),
}
