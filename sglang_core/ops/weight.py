"""`PackedWeight`: a weight in a named format, as the chosen kernel wants its bytes."""

from __future__ import annotations

from torch import Tensor, nn


class PackedWeight(nn.Module):
    """Buffers of one weight matrix of logical shape [out_features, in_features].

    `fmt` names the canonical format ("dense" for float32/bfloat16/float16). `layout` is "canonical" until a kernel's `pack`
    rewrites the buffers for itself; only that kernel then knows what they mean.
    """

    def __init__(
        self, fmt: str, tensors: dict[str, Tensor], *, out_features: int, in_features: int, layout: str = "canonical"
    ) -> None:
        super().__init__()
        self.fmt, self.layout = fmt, layout
        self.out_features, self.in_features = out_features, in_features
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]
