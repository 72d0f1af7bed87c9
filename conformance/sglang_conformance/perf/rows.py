"""What goes over rows once: norms, rotations, activations, tables, logits. Bytes decide; operations are not counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sglang_conformance.perf.load import STEPS, PerfEnv, Work, add, copies_of, size_of
from sglang_core.ops.rope import RopeSpec, rope_table
from sglang_core.ops.sampling import SampleParams

M, F, V, EPS = 2048, 6144, 151_936, 1e-6
ROPE = RopeSpec(head_dim=128, rotary_dim=128)


def over(env: PerfEnv, shapes: list[tuple[int, ...]], call: Callable[..., object], *, passes: float = 2.0) -> Work:
    """`call` gets tensors of these shapes, new ones each time; `passes` is bytes moved over bytes given."""
    given = sum(size_of(env.normal(*shape)) for shape in shapes)
    columns = [env.tensors(*shape, copies=copies_of(given)) for shape in shapes]
    calls = [partial(call, *tensors) for tensors in zip(*columns, strict=True)]
    return Work(calls=calls, nbytes=int(passes * given))


def norm(env: PerfEnv, tokens: int, name: str) -> Work:
    op, w = env.op(name, dims={"M": M}), env.normal(M)
    if name == "norm.rms_gated":
        return over(env, [(tokens, M)] * 2, lambda x, gate: op(x, gate, w, EPS), passes=1.5)
    if name == "norm.add_rms":
        return over(env, [(tokens, M)] * 2, lambda x, residual: op(x, residual, w, EPS))
    if name == "norm.layer":
        return over(env, [(tokens, M)], lambda x: op(x, w, w, EPS))
    return over(env, [(tokens, M)], lambda x: op(x, w, EPS))


def norm_quant(env: PerfEnv, tokens: int) -> Work:
    """Reads x and the residual, writes the sum, and codes of half its bytes."""
    op, w = env.op("norm.add_rms_quant", fmt="int8", dims={"M": M}), env.normal(M)
    return over(env, [(tokens, M)] * 2, lambda x, residual: op(x, residual, w, EPS, "int8"), passes=1.75)


def gated_quant(env: PerfEnv, tokens: int) -> Work:
    op = env.op("act.gated_quant", fmt="int8", dims={"F": F})
    return over(env, [(tokens, 2 * F)], lambda x: op(x, "silu", "int8"), passes=1.25)


def gated(env: PerfEnv, tokens: int) -> Work:
    op = env.op("act.gated", dims={"F": F})
    return over(env, [(tokens, 2 * F)], lambda x: op(x, "silu"), passes=1.5)


def rotate(env: PerfEnv, tokens: int) -> Work:
    op = env.op("rope.apply", spec=ROPE, dims={"D": ROPE.head_dim})
    table, positions = env.place(rope_table(ROPE, 1024)), env.integers(0, 1024, tokens)
    return over(env, [(tokens, 16, 128), (tokens, 8, 128)], lambda q, k: op(q, k, positions, table, ROPE))


def lookup(env: PerfEnv, tokens: int) -> Work:
    """A table larger than caches; each call asks for other rows."""
    rows = 65_536
    op, table = env.op("embed.lookup", dims={"V": rows, "M": M}), env.normal(rows, M)
    calls = [partial(op, env.integers(0, rows, tokens), table, 0) for _ in range(64)]
    return Work(calls=calls, nbytes=2 * tokens * M * table.element_size())


def mask(env: PerfEnv, rows: int) -> Work:
    op, words = env.op("logits.mask", dims={"V": V}), env.integers(-(2**31), 2**31 - 1, rows, V // 32)
    return over(env, [(rows, V)], lambda logits: op(logits, words))


def soft_cap(env: PerfEnv, rows: int) -> Work:
    op = env.op("logits.soft_cap", dims={"V": V})
    return over(env, [(rows, V)], lambda logits: op(logits, 30.0))


def sample(env: PerfEnv, rows: int, **static: Any) -> Work:
    """What cannot be less: the logits, read once, in float32 as a head gives them."""

    def every(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return env.place(torch.full((rows,), value).to(dtype))

    params = SampleParams(
        temperature=every(0.0 if static.get("all_greedy") else 0.7),
        top_p=every(0.9),
        top_k=every(50, torch.int32),
        min_p=every(0.0),
        seeds=env.integers(-(2**31), 2**31 - 1, rows),
        positions=env.integers(0, 1024, rows),
        **static,
    )
    op = env.op("sample.sample", dims={"V": V})
    nbytes = 4 * rows * V
    logits = [x.float() for x in env.tensors(rows, V, copies=copies_of(nbytes))]
    return Work(calls=[partial(op, x, params) for x in logits], nbytes=nbytes)


def adapters(env: PerfEnv, tokens: int) -> Work:
    """Four adapters of rank 16, a token each in turn. Bytes: the pairs in use, x, and y twice."""
    num, rank = 4, 16
    op = env.op("lora.apply", dims={"A": num, "P": 1, "R": rank, "in": M, "out": M})
    own = env.place((torch.arange(tokens) % num).int())
    x, scale = env.normal(tokens, M), env.place(torch.ones(num, 1))
    a, b, used = env.normal(num, rank, M), env.normal(num, M, rank), min(num, tokens)
    calls = [partial(op, y, x, a, b, own, scale) for y in env.tensors(tokens, M, copies=copies_of(size_of(x)))]
    nbytes = size_of(a, b) * used // num + 3 * size_of(x)
    return Work(calls=calls, nbytes=nbytes, flops=2 * tokens * rank * 2 * M)


Make = Callable[..., Work]
NORMS: dict[str, Make] = {
    name: partial(norm, name=name) for name in ("norm.rms", "norm.rms_gated", "norm.add_rms", "norm.layer")
}
OF_TOKENS: dict[str, Make] = NORMS | {
    "rope.apply": rotate,
    "act.gated": gated,
    "norm.add_rms_quant": norm_quant,
    "act.gated_quant": gated_quant,
    "embed.lookup": lookup,
    "lora.apply": adapters,
}
for name, make in OF_TOKENS.items():
    for step, tokens in STEPS.items():
        add(name, step, partial(make, tokens=tokens))
OF_LOGITS: dict[str, Make] = {"logits.mask": mask, "logits.soft_cap": soft_cap}
for name, make in OF_LOGITS.items():
    for rows in (1, 8, 32):
        add(name, f"{rows} rows", partial(make, rows=rows))
SAMPLED: dict[str, dict[str, Any]] = {"greedy": {"all_greedy": True}, "top-k and top-p": {"max_top_k": 64}}
for what, static in SAMPLED.items():
    for rows in (1, 8, 32):
        add("sample.sample", f"{what}, {rows} rows", partial(sample, rows=rows, **static))
