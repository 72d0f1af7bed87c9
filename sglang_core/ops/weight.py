"""`PackedWeight`: a weight in a named format, as the chosen kernel wants its bytes."""

from __future__ import annotations

from torch import Tensor, nn


class PackedWeight(nn.Module):
    """Buffers of one weight matrix of logical shape [out_features, in_features], or of a stack of `num_experts` such.

    `fmt` names the canonical format ("dense" for float32/bfloat16/float16). `layout` is "canonical" until a kernel's `pack`
    rewrites the buffers for itself; only that kernel then knows what they mean. In a canonical stack every buffer has the
    experts as its first dim, and is otherwise what a single matrix of that format has.
    """

    def __init__(
        self,
        fmt: str,
        tensors: dict[str, Tensor],
        *,
        out_features: int,
        in_features: int,
        num_experts: int | None = None,
        layout: str = "canonical",
    ) -> None:
        super().__init__()
        self.fmt, self.layout = fmt, layout
        self.out_features, self.in_features, self.num_experts = out_features, in_features, num_experts
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]

    def experts(self, ids: Tensor) -> PackedWeight:
        """ids: int32[n] -> a canonical stack of copies of these experts, in this order."""
        assert self.num_experts is not None and self.layout == "canonical", f"no stack of experts: {self.layout}"
        chosen = {name: tensor.index_select(0, ids) for name, tensor in self._buffers.items() if tensor is not None}
        return PackedWeight(
            self.fmt, chosen, out_features=self.out_features, in_features=self.in_features, num_experts=ids.shape[0]
        )

    def expert(self, i: int) -> PackedWeight:
        """One matrix of a canonical stack, views of it."""
        assert self.num_experts is not None and self.layout == "canonical", f"no stack of experts: {self.layout}"
        one = {name: tensor[i] for name, tensor in self._buffers.items() if tensor is not None}
        return PackedWeight(self.fmt, one, out_features=self.out_features, in_features=self.in_features)
