"""Every op body keeps the rules of a step: traced on a fake device, it reads nothing on the host and writes only the pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sglang_core.backend.strict_trace import trace_step
from sglang_core.ops import OPS
from sglang_core.ops.attention import RaggedBatch, attn_plan
from sglang_core.ops.codes import CODE_KINDS, coded
from sglang_core.ops.gemm import dense
from sglang_core.ops.lora import ExpertAdapters
from sglang_core.ops.mla import attn_mla_plan
from sglang_core.ops.moe import ExpertSpec, RouteSpec
from sglang_core.ops.quant import quantize
from sglang_core.ops.rope import RopeSpec, rope_table
from sglang_core.ops.rope_paged import HeadNorms
from sglang_core.ops.ssm_plan import ssm_plan
from tests.ops.mla_case import MLACase, mla_case
from tests.ops.paged_case import CPU, PagedCase, attn_spec, paged_case
from tests.ops.state_case import StateCase, state_case
from tests.ops.test_sampling import params

ROPES = {style: RopeSpec(head_dim=8, rotary_dim=4, style=style) for style in ("neox", "interleaved")}  # type: ignore[arg-type]


@dataclass
class Call:
    """An op call: tensors in `args` (and, for paged attention, the pool of `case`)."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    case: PagedCase | MLACase | StateCase | None = None


def call(op: str, *args: Any, **kwargs: Any) -> Call:
    return Call(op, args, kwargs)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def paged(static: bool, sinks: bool, kv_dtype: torch.dtype | None = None, **more: Any) -> Call:
    parents = [[-1], [-1, *range(10), *range(9)]] if more.get("tree") else None
    spec = attn_spec(has_sinks=sinks, **more)
    case = paged_case([(9, 1), (0, 20)], spec=spec, static=static, parents=parents, kv_dtype=kv_dtype)
    plan = attn_plan(case.spec, case.batch, CPU)
    kwargs = {"lse": True} | ({"sinks": torch.zeros(4)} if sinks else {})
    return Call("attn.paged", (case.q, case.k, case.v, case.pool, 0, case.spec, plan), kwargs, case)


def roped(static: bool, normed: bool) -> Call:
    c = paged(static, sinks=True)
    q, k, v, *rest = c.args
    rotary = RopeSpec(head_dim=q.shape[2], rotary_dim=q.shape[2])
    norms = HeadNorms(torch.ones(q.shape[2]), torch.ones(q.shape[2]), 1e-6) if normed else None
    positions = torch.zeros(q.shape[0], dtype=torch.int32)
    args = q, k, v, positions, rope_table(rotary, 9), rotary, *rest
    return Call("attn.rope_paged", args, c.kwargs | {"head_norms": norms}, c.case)


def written() -> Call:
    case = paged_case([(9, 1)])
    return Call("kv.write", (case.k, case.v, case.pool, 0, case.batch.slot_mapping_cpu), {}, case)


def latent(static: bool, kv_dtype: torch.dtype | None = None) -> Call:
    case = mla_case([(9, 1), (0, 20)], static=static, kv_dtype=kv_dtype)
    plan = attn_mla_plan(case.spec, case.batch, CPU)
    args = (case.q_nope, case.q_pe, case.c_kv, case.k_pe, case.pool, 0, case.spec, plan)
    return Call("attn.mla_paged", args, {"lse": True}, case)


def written_latents() -> Call:
    case = mla_case([(9, 1)])
    return Call("kv.write_mla", (case.c_kv, case.k_pe, case.pool, 0, case.batch.slot_mapping_cpu), {}, case)


def recurrent(op: str, static: bool) -> Call:
    case = state_case([(True, 1), (False, 70)], static=static, padding=(3, 1))
    plan = ssm_plan(case.spec, case.batch, CPU)
    if op == "ssm.gated_delta_rule":
        return Call(op, (*case.delta_args, case.pool, 1, case.spec, plan), {}, case)
    weight = torch.randn(case.spec.conv_dim, case.spec.conv_width)
    return Call(op, (case.x, weight, weight[:, 0], case.pool, 1, plan), {"activation": "silu"}, case)


def experts(act: ExpertSpec, **more: Any) -> Call:
    ids = ints(*range(5), *range(5)).view(5, 2) % 3
    return call(
        "moe.fused", X, dense(torch.randn(3, 8, 8)), dense(torch.randn(3, 8, 4)), torch.rand(5, 2), ids, act, **more
    )


QUANTISED = (torch.float8_e4m3fn, torch.int8)


def adapted(tokens: torch.Tensor, num: int = 3) -> Call:
    a, b = torch.zeros(num, 4, 8), torch.zeros(num, 8, 2)
    return call("lora.apply", X, X, a, b, tokens, torch.ones(num, 2), (3, 5))


def adapted_experts(tokens: torch.Tensor | None) -> Call:
    sizes = [(2, 3, 4, 8), (2, 3, 8, 2), (2, 3, 2, 4), (2, 3, 8, 2), (2, 3, 3)]
    stacks = dict(zip(("a13", "b13", "a2", "b2", "scale"), map(torch.zeros, sizes), strict=True))
    plain = experts(ExpertSpec())
    return call("lora.experts", *plain.args, ExpertAdapters(**stacks), tokens)


X, W = torch.randn(5, 8), torch.randn(8)
IDS, OWN = torch.arange(5, dtype=torch.int32), torch.tensor([0, -1, 1, 1, 0], dtype=torch.int32)
Q, K = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
CALLS: list[Callable[[], Call]] = [
    lambda: paged(static=False, sinks=False),
    lambda: paged(static=True, sinks=True, window=5, soft_cap=3.0),
    *[lambda dtype=dtype: paged(static=True, sinks=False, kv_dtype=dtype) for dtype in QUANTISED],
    lambda: paged(static=False, sinks=True, tree=True),
    lambda: paged(static=True, sinks=False, tree=True, window=5, soft_cap=3.0),
    lambda: paged(static=True, sinks=False, causal=False),
    lambda: roped(static=False, normed=True),
    lambda: roped(static=True, normed=False),
    written,
    lambda: latent(static=False),
    *[lambda dtype=dtype: latent(static=True, kv_dtype=dtype) for dtype in QUANTISED],
    lambda: latent(static=True),
    written_latents,
    lambda: call("attn.mla_project", Q, torch.randn(4, 8, 6)),
    *[
        lambda op=op, static=static: recurrent(op, static)
        for op in ("ssm.causal_conv1d", "ssm.gated_delta_rule")
        for static in (False, True)
    ],
    lambda: call("ssm.gates", Q, Q, -torch.rand(32), torch.zeros(32)),
    lambda: call("attn.ragged", Q, K, K, RaggedBatch.of([2, 3], [2, 3], CPU), attn_spec(), lse=True),
    lambda: call("attn.merge", Q, Q[..., 0], Q, Q[..., 0]),
    lambda: call("gemm.linear", X, dense(torch.randn(3, 8)), torch.randn(3)),
    lambda: call("gemm.grouped", X, dense(torch.randn(3, 4, 8)), ints(1, 0, 3), torch.randn(3, 4)),
    lambda: call("moe.route", X, RouteSpec(num_experts=8, top_k=2, num_groups=4, top_groups=2, has_bias=True), W),
    lambda: experts(ExpertSpec(), expert_map=ints(0, -1, 1)),
    lambda: experts(ExpertSpec(activation="swiglu_clamped", weight_on_input=True)),
    lambda: call("quant.quantize", X, "int4.awq.g32"),
    lambda: call("quant.quantize", X, "nvfp4.g16"),
    lambda: call("quant.dequantize", quantize(X, "int4.awq.g32"), torch.bfloat16),
    lambda: adapted(tokens=ints(0, -1, 1, 1, 0)),
    lambda: adapted(tokens=ints(0, -1, 1, 1, 0), num=9),
    lambda: call("lora.embed", X, IDS, torch.zeros(3, 9, 2), torch.zeros(3, 8, 2), OWN, torch.ones(3, 1), 2),
    lambda: adapted_experts(OWN),
    lambda: adapted_experts(None),
    lambda: call("norm.rms", X, W, 1e-6),
    lambda: call("norm.layer", X, W, W, 1e-6),
    lambda: call("norm.rms_gated", X, X, W, 1e-6),
    lambda: call("norm.add_rms", X, X, W, 1e-6),
    *[lambda kind=kind: call("norm.add_rms_quant", X, X, W, 1e-6, kind) for kind in CODE_KINDS],
    *[lambda kind=kind: call("act.gated_quant", X, "silu", kind) for kind in CODE_KINDS],
    lambda: call("gemm.linear", coded(X, "int8"), quantize(torch.randn(3, 8), "int8.token_channel")),
    lambda: call("gemm.linear", coded(X, "fp8_block"), quantize(torch.randn(3, 8), "fp8.block128")),
    lambda: call("rope.apply", Q, K, ints(0, 1, 2, 3, 4), rope_table(ROPES["neox"], 9), ROPES["neox"]),
    lambda: call("rope.apply", Q, K, ints(0, 1, 2, 3, 4), rope_table(ROPES["interleaved"], 9), ROPES["interleaved"]),
    lambda: call("gemm.linear_gated", X, dense(torch.randn(6, 8)), "silu", torch.randn(6)),
    *[lambda kind=kind: call("act.gated", X, kind) for kind in ("silu", "gelu", "gelu_tanh")],
    lambda: call("embed.lookup", ints(1, 2), torch.randn(9, 4), 3),
    lambda: call("logits.soft_cap", X, 3.0),
    lambda: call("logits.mask", X, torch.zeros(5, 1, dtype=torch.int32)),
    lambda: call("logits.adjust", X, ints(0, 1), ints(2, 3), torch.ones(2), torch.zeros(2)),
    lambda: call("sample.sample", X, params(5, 8), logprobs=True),
    lambda: call("sample.sample", X, params(5, 8, max_top_k=4), logprobs=False),
    lambda: call("sample.sample", X, params(5, 8, needs_filter=False)),
    lambda: call("sample.sample", X, params(5, 8, all_greedy=True)),
]


@pytest.mark.parametrize("make", CALLS, ids=lambda make: make().op)
def test_body_traces_on_a_fake_device(make: Callable[[], Call]) -> None:
    c = make()
    mutable = c.case.pool.leaves if c.case else []
    before = [t._version for t in _tensors(c.args)]
    trace_step(lambda _, fb: OPS[c.op].body(*fb[0], **fb[1]), None, (c.args, c.kwargs), mutable)
    with torch.inference_mode():
        OPS[c.op].body(*c.args, **c.kwargs)
    assert [t._version for t in _tensors(c.args)] == before


def _tensors(args: tuple[Any, ...]) -> list[torch.Tensor]:
    return [a for a in args if isinstance(a, torch.Tensor)]


def test_every_op_is_traced() -> None:
    assert {make().op for make in CALLS} == {name for name, op in OPS.items() if not op.host}


def paged_decode(num_reqs: int) -> Call:
    case = paged_case([(9, 1)] * num_reqs, spec=attn_spec(), static=True)
    plan = attn_plan(case.spec, case.batch, CPU)
    return Call("attn.paged", (case.q, case.k, case.v, case.pool, 0, case.spec, plan), {}, case)


def latent_decode(num_reqs: int) -> Call:
    case = mla_case([(9, 1)] * num_reqs, static=True)
    plan = attn_mla_plan(case.spec, case.batch, CPU)
    return Call(
        "attn.mla_paged", (case.q_nope, case.q_pe, case.c_kv, case.k_pe, case.pool, 0, case.spec, plan), {}, case
    )


def recurrent_decode(num_reqs: int) -> Call:
    case = state_case([(True, 1)] * num_reqs, static=True)
    plan = ssm_plan(case.spec, case.batch, CPU)
    return Call("ssm.gated_delta_rule", (*case.delta_args, case.pool, 1, case.spec, plan), {}, case)


def sampled(num_reqs: int) -> Call:
    return call("sample.sample", torch.randn(num_reqs, 8), params(num_reqs, 8))


@pytest.mark.parametrize(
    "make", [paged_decode, latent_decode, recurrent_decode, sampled], ids=lambda make: make.__name__
)
def test_no_body_loops_over_reqs(make: Callable[[int], Call]) -> None:
    """Eight reqs take the ops that two take."""
    counts = []
    for num_reqs in (2, 8):
        c = make(num_reqs)
        mutable = c.case.pool.leaves if c.case else []
        traced = trace_step(lambda _, fb, c=c: OPS[c.op].body(*fb[0], **fb[1]), None, (c.args, c.kwargs), mutable)
        counts.append(traced.num_results)
    assert counts[0] == counts[1] > 0
