"""lora.apply: each token times its own adapter only (csrc/lora.inl)."""

from __future__ import annotations

from torch import Tensor

from sglang_core.api.ops import OPS
from sglang_xeon.library import ops

_lora = ops.lora.default
_body = OPS["lora.apply"].body


def apply(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    token_adapter: Tensor,
    scale: Tensor,
    parts: tuple[int, ...] = (),
) -> Tensor:
    """y: [T, out], x: [T, in], a: [A, P * R, in], b: [A, out, R], token_adapter: int32[T], scale: float32[A, P] -> [T, out].

    Activations of another dtype than the adapters', as a float32 head's, go through the op's body.
    """
    if x.dtype != a.dtype:
        return _body(y, x, a, b, token_adapter, scale, parts)  # type: ignore[no-any-return]
    return _lora(y, x, a, b, token_adapter, scale, parts)  # type: ignore[no-any-return]
