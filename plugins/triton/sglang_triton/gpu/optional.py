"""Packages with kernels that are used where they are installed: which releases their provider was written against. Imports none of them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from sglang_core.api import DeviceNote, Kernel, SelectionContext
from sglang_triton.kernels import DTYPES, GRAPHS

Limits = Callable[[SelectionContext], str | None]


def problem(package: str, releases: str, source: str = "") -> str:
    """Why a package cannot be used: "" or a reason. `releases`: as in a requirement, ">=1.0,<1.1". `source`: where to get it, if no index has it."""
    try:
        found = version(package)
    except PackageNotFoundError:
        how = f"get {package}{releases} from {source}" if source else f"pip install '{package}{releases}'"
        return f"{package} is not installed; {how}"
    if found not in SpecifierSet(releases, prereleases=True):
        return f"it is written for {package} {releases}, and {found} is installed"
    return ""


def provider_note(name: str, missing: str) -> DeviceNote:
    """For `sglang-core doctor`; `missing`: of `problem`. Nothing is wrong where a package is missing: other kernels run."""
    return DeviceNote(name=name, found=f"not used: {missing}" if missing else "used: `explain` says where")


def paged_attention(
    provider: str, module: str, device: str, *, missing: str, limits: Limits, priority: int
) -> list[Kernel]:
    """attn.paged with a plan of its own, both in `module`; attn.rope_paged, which is Triton's up to it, and kv.write, as pools are laid out alike.

    `missing`: of `problem`.
    """

    def attention(ctx: SelectionContext) -> str | None:
        return missing or limits(ctx)

    def write(ctx: SelectionContext) -> str | None:
        return missing or (None if ctx.site.dtype in DTYPES else f"takes no {ctx.site.dtype}")

    listed: dict[str, tuple[str, Limits]] = {
        "attn.paged": (f"{module}:paged", attention),
        "attn.plan": (f"{module}:plan", attention),
        "attn.rope_paged": (f"{module}:rope_paged", attention),
        "kv.write": ("sglang_triton.kv_write:kv_write", write),
    }
    return [
        Kernel(op, provider=provider, fn=fn, device=(device,), priority=priority, supports=supports, features=GRAPHS)
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
