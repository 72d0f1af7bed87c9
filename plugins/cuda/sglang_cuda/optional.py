"""What providers of attention have in common that are used where their package is installed. Imports none of them."""

from __future__ import annotations

from collections.abc import Callable

from sglang_triton.kernels import DTYPES, GRAPHS

from sglang_core.api import Kernel, SelectionContext

Limits = Callable[[SelectionContext], str | None]


def paged_attention(provider: str, module: str, *, missing: str, limits: Limits, priority: int) -> list[Kernel]:
    """attn.paged with a plan of its own, both in `module`, and Triton's kv.write, as pools are laid out alike. `missing`: of `problem`."""

    def attention(ctx: SelectionContext) -> str | None:
        return missing or limits(ctx)

    def write(ctx: SelectionContext) -> str | None:
        return missing or (None if ctx.site.dtype in DTYPES else f"takes no {ctx.site.dtype}")

    listed: dict[str, tuple[str, Limits]] = {
        "attn.paged": (f"{module}:paged", attention),
        "attn.plan": (f"{module}:plan", attention),
        "kv.write": ("sglang_triton.kv_write:kv_write", write),
    }
    return [
        Kernel(op, provider=provider, fn=fn, device=("cuda",), priority=priority, supports=supports, features=GRAPHS)
        for op, (fn, supports) in listed.items()
    ]


def plain_heads(ctx: SelectionContext, head_dims: tuple[int, ...]) -> str | None:
    """What refuses all but heads of these sizes over whole prefixes: libraries multiply masked values by zero, and freed pages may hold NaN."""
    spec = ctx.site.spec
    if spec.head_dim != spec.v_head_dim or spec.head_dim not in head_dims:
        return f"is called for heads of {', '.join(map(str, head_dims))}, not {spec.head_dim} and {spec.v_head_dim}"
    unknown = {
        "windows": spec.window,
        "sinks": spec.has_sinks,
        "trees of drafts": spec.tree,
        "cross attention": spec.cross,
    }
    found = [name for name, there in unknown.items() if there]
    return f"is not called for {', '.join(found)}" if found else None
