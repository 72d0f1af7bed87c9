"""The hooks of group `sglang_core.plugins`. Many plugins may answer each; a name that two of them give is an error."""

from __future__ import annotations

from collections.abc import Mapping

import pluggy

from sglang_core.backend.interface import KernelContext
from sglang_core.backend.kernel import Kernel

PROJECT = "sglang_core"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def sglang_kernels(ctx: KernelContext) -> list[Kernel]:  # type: ignore[empty-body]
    """Kernels for the device in `ctx`, beside those of its own backend."""


@hookspec
def sglang_models() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Architecture as in config.json -> "module:Class" of the model."""


@hookspec
def sglang_parsers() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Parser, as "reasoning/NAME" or "tool_call/NAME" -> "module:Class"."""


@hookspec
def sglang_grammar_engines() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Grammar engine -> "module:Class"."""


@hookspec
def sglang_routing_policies() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Routing policy -> "module:Class"."""
