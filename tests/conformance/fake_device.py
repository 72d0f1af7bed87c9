"""A backend whose kernels, claims and facts a test gives."""

from __future__ import annotations

from typing import Any

from sglang_conformance.runner import Suite

from sglang_core.backend.claims import Claims
from sglang_core.backend.interface import DeviceInfo, KernelContext
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.torch_backend import TorchBackend


class FakeBackend(TorchBackend):
    name = "fake"

    def __init__(self, claims: Claims) -> None:
        self._claims = claims

    def probe(self) -> list[DeviceInfo]:
        return []

    def claims(self, ctx: KernelContext) -> Claims:
        return self._claims


def layer_norm(function: str, **facts: Any) -> Kernel:
    """A kernel of norm.layer in `broken`."""
    target = f"tests.conformance.broken:{function}"
    return Kernel("norm.layer", provider="fake", fn=target, device=("fake",), **facts)


def suite(*kernels: Kernel, claims: Claims | None = None, facts: dict[str, Any] | None = None, **more: Any) -> Suite:
    """Float32 and bfloat16 of every kernel's op are claimed unless `claims` are given."""
    info = DeviceInfo(backend="fake", path="fake", name="made up", facts=facts or {}, versions={"driver": "1.0"})
    native = Claims.native([k.op for k in kernels], dtypes=("float32", "bfloat16"), profiles=("odd_sizes",))
    return Suite(FakeBackend(claims or native), info, num_threads=1, kernels=kernels, **more)
