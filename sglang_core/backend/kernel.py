"""`Kernel`: one implementation of an op, and the static facts on which it is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # interface.py imports this file
    from sglang_core.backend.interface import DeviceInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class OpSite:
    """One place in a model where an op is called: the question that selection answers, once, at build time."""

    op: str
    layer: str  # class of the layer that asks: "RMSNorm", "QKVLinear", ...
    dtype: str  # of the activations: "bfloat16"
    fmt: str = "*"  # weight format where there is one: "bf16", "fp8.block128", ...; of `*_quant`, the kind of codes
    spec: Any = None  # the op family's spec: AttnSpec, RopeSpec, ...; hashable
    dims: Mapping[str, int] = field(default_factory=dict)  # static sizes by the shape alphabet: {"M": 1024, "F": 3072}
    # Of a composite: where its parts run, if not at its own facts. A part that is not among them is not called there.
    parts: tuple[OpSite, ...] = ()

    def part(self, op: str) -> OpSite | None:
        """The site of one of its parts; None where it is not called."""
        return next((site for site in self.parts if site.op == op), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionContext:
    """What `Kernel.supports` may look at. Pure, static facts only: no tensor, no clock, no environment."""

    device: DeviceInfo
    site: OpSite
    page_size: int = 0
    kv_layout: str = "canonical"
    deterministic: bool = False


Supports = Callable[[SelectionContext], str | None]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of an op.

    `fn` is "module:function", imported only once the kernel is chosen; so are `pack` and `unpack`. The function has the op's
    signature. `supports` returns None, or the reason why not. `device` lists path prefixes, whole segments each
    ("cuda/sm_90"; "*" is any device). `tokens` is an inclusive range of T, the size of the first argument; None as its end
    is no bound. Several kernels of one provider with ranges make the variants of one op, which share one pack.

    `packed_layout` names the bytes that `pack` makes, as "acme.tiles/2": equal names promise equal bytes of equal weights, so
    it changes whenever they do, and says which instruction set they are for where they depend on it. The core keeps packed
    weights on disk (`--packed-cache`) under that name; those of a kernel without one are packed at every start.

    `tune` is "module:Class" of a `Tuner`, for `sglang-core tune`. `note` is what `explain` says of the kernel where it was chosen, as the
    file that its configs come from.
    """

    op: str
    provider: str = ""  # the backend's name by default
    fn: str = field(kw_only=True)
    device: tuple[str, ...] = field(kw_only=True)
    priority: int = field(default=50, kw_only=True)
    supports: Supports | None = field(default=None, kw_only=True)
    pack: str | None = field(
        default=None, kw_only=True
    )  # "module:function": pack(w: PackedWeight, out=None) -> PackedWeight
    unpack: str | None = field(default=None, kw_only=True)
    packed_layout: str = field(default="", kw_only=True)
    kv_layouts: tuple[str, ...] = field(default=("canonical",), kw_only=True)
    tokens: tuple[int, int | None] | None = field(default=None, kw_only=True)
    features: frozenset[str] = field(
        default=frozenset(), kw_only=True
    )  # "graph_safe", "batch_invariant", "takes_codes"
    tune: str | None = field(default=None, kw_only=True)
    note: str = field(default="", kw_only=True)
