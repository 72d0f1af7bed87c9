"""What goes over rows once, and sampling over a vocabulary: bytes decide."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.load import Load, Work, size_of
from benchmarks.gpu.opened import PAGE_SIZE, Opened
from sglang_core.backend.pool import PoolSpec
from sglang_core.ops.rope import RopeSpec, rope_table
from sglang_core.ops.sampling import SampleParams

M, F, V, TOKENS = 4096, 14_336, 151_936, 4096
ROPE = RopeSpec(head_dim=128, rotary_dim=128)
BF16 = torch.bfloat16


def tokens_of(opened: Opened) -> int:
    return 8 if opened.small else TOKENS


def add_norm(opened: Opened) -> Work:
    """Reads x and the residual, writes both."""
    make, width = opened.operands(), 128 if opened.small else M
    bound = opened.bind(make, "norm.add_rms", dims={"M": width})
    x, residual = (make.normal(tokens_of(opened), width, dtype=BF16) for _ in range(2))
    w = make.normal(width, dtype=BF16)
    return Work(call=partial(bound.fn, x, residual, w, 1e-6), provider=bound.provider, nbytes=2 * size_of(x, residual))


def gate(opened: Opened) -> Work:
    make, width = opened.operands(), 128 if opened.small else F
    bound = opened.bind(make, "act.gated", spec="silu", dims={"F": width})
    x = make.normal(tokens_of(opened), 2 * width, dtype=BF16)
    return Work(call=partial(bound.fn, x, "silu"), provider=bound.provider, nbytes=size_of(x) * 3 // 2)


def rotate_and_write(opened: Opened) -> Work:
    """q and k are turned, k and v written to the pool: q read and written, k and v read and written, k once more in between."""
    make, tokens = opened.operands(), tokens_of(opened)
    rope = opened.bind(make, "rope.apply", spec=ROPE, dims={"D": 128})
    write = opened.bind(make, "kv.write", dims={"Hk": 8, "D": 128})
    q, k, v = (make.normal(tokens, heads, 128, dtype=BF16) for heads in (32, 8, 8))
    shape = PoolSpec(num_layers=1, page_size=PAGE_SIZE, num_kv_heads=8, head_dim=128, v_head_dim=128, dtype=BF16)
    pool = opened.runtime.alloc_pool(shape, tokens // PAGE_SIZE + 2)
    slots = make.place(torch.randperm(tokens, generator=make.generator).int() + PAGE_SIZE)
    positions = make.place(torch.arange(tokens, dtype=torch.int32))
    table = make.place(rope_table(ROPE, tokens))

    def call() -> object:
        _, turned = rope.fn(q, k, positions, table, ROPE)
        return write.fn(turned, v, pool, 0, slots)

    return Work(call=call, provider=f"{rope.provider}, {write.provider}", nbytes=2 * size_of(q, k, v))


def sample(opened: Opened, *, rows: int, greedy: bool) -> Work:
    """What cannot be less: the logits, read once, in float32 as a head gives them."""
    make, width = opened.operands(), 512 if opened.small else V
    bound = opened.bind(make, "sample.sample", dims={"V": width})
    logits = make.normal(rows, width, dtype=torch.float32)

    def every(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return make.place(torch.full((rows,), value).to(dtype))

    params = SampleParams(
        temperature=every(0.0 if greedy else 0.7),
        top_p=every(0.9),
        top_k=every(50, torch.int32),
        min_p=every(0.0),
        seeds=make.place(torch.arange(rows, dtype=torch.int32)),
        positions=make.place(torch.arange(rows, dtype=torch.int32)),
        **({"all_greedy": True} if greedy else {"max_top_k": 64}),
    )
    return Work(call=partial(bound.fn, logits, params), provider=bound.provider, nbytes=size_of(logits))


LOADS = [
    Load(name="norm.add_rms, 4096 x 4096", make=add_norm, target=0.8, rank=7),
    Load(name="rope and kv.write, 4096 tokens", make=rotate_and_write, target=0.8, rank=8),
    Load(name="act.gated, 4096 x 14336", make=gate, target=0.8, rank=14),
    Load(
        name="sampling, top-k and top-p, 64 x 151936", make=partial(sample, rows=64, greedy=False), target=0.8, rank=9
    ),
    Load(name="sampling, greedy, 64 x 151936", make=partial(sample, rows=64, greedy=True), target=0.8, rank=34),
]
