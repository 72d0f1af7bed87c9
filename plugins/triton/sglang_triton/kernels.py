"""Which kernels there are, as facts. Imports neither torch nor triton: a kernel's module is imported once it is chosen."""

from __future__ import annotations

from typing import Any

from sglang_core.api import Kernel, SelectionContext

DEVICES = ("cuda", "rocm", "triton")
# Below the 50 of a backend's own kernels, which know more about their device.
PRIORITY = 40
DTYPES = ("bfloat16", "float16", "float32")
INVARIANT = frozenset({"graph_safe", "batch_invariant"})  # a row's result does not depend on its neighbours


def dtype_limits(ctx: SelectionContext) -> str | None:
    return None if ctx.site.dtype in DTYPES else f"takes {', '.join(DTYPES)}, not {ctx.site.dtype}"


def _kernel(op: str, fn: str, **facts: Any) -> Kernel:
    defaults: dict[str, Any] = {"supports": dtype_limits, "features": INVARIANT, "priority": PRIORITY}
    return Kernel(op, fn=f"sglang_triton.{fn}", device=DEVICES, **(defaults | facts))


KERNELS = (
    _kernel("act.gated", "activation:gated"),
    _kernel("norm.rms", "norm:rms_norm"),
    _kernel("norm.add_rms", "norm:add_rms_norm"),
    _kernel("norm.layer", "norm:layer_norm"),
    _kernel("rope.apply", "rope:rope_apply"),
    _kernel("embed.lookup", "embedding:embed_lookup"),
    _kernel("kv.write", "kv_write:kv_write"),
    _kernel("kv.write_mla", "kv_write:kv_write_mla"),
    _kernel("logits.mask", "logits:mask"),
    _kernel("logits.adjust", "logits:adjust"),
    _kernel("logits.soft_cap", "logits:soft_cap"),
    _kernel("sample.sample", "sampling:sample"),
)
