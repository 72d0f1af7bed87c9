"""Which kernels may run at a site: path match, pool layout, determinism, then the kernel's own word. Imports no kernel."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sglang_core.backend.kernel import Kernel, SelectionContext
from sglang_core.errors import KernelSelectionError, PluginError

BATCH_INVARIANT = "batch_invariant"
Rank = tuple[int, int]  # segments of the device path that match, priority
Refusals = tuple[tuple[str, str], ...]  # (kernel, the reason why not)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A kernel for the op of a site: its rank, or why it may not run there."""

    kernel: Kernel
    rank: Rank
    refusal: str | None

    @property
    def title(self) -> str:
        return kernel_title(self.kernel)


def kernel_title(kernel: Kernel) -> str:
    return f"{kernel.provider} ({kernel.fn})"


def judge(kernel: Kernel, ctx: SelectionContext) -> Candidate:
    """Ask a kernel whether it runs here. Raises PluginError where its `supports` raises or gives no reason."""
    depth = _match(kernel.device, ctx.device.path)
    rank = (-1 if depth is None else depth, kernel.priority)
    return Candidate(kernel=kernel, rank=rank, refusal=_refusal(kernel, depth, ctx))


def tie(a: Candidate, b: Candidate) -> KernelSelectionError:
    """The error for two kernels of equal rank."""
    op = a.kernel.op
    a, b = sorted((a, b), key=lambda c: c.title)
    return KernelSelectionError(
        f"{op}: {a.title} and {b.title} match the device equally long with priority {a.rank[1]}; give one of them another"
        f" priority, or choose with --kernel {op}={a.kernel.provider}"
    )


def _match(prefixes: Iterable[str], path: str) -> int | None:
    """Segments of the longest prefix that `path` starts with; "*" matches with none."""
    segments = path.split("/")
    wanted = [[] if prefix == "*" else prefix.split("/") for prefix in prefixes]
    return max((len(w) for w in wanted if segments[: len(w)] == w), default=None)


def _refusal(kernel: Kernel, depth: int | None, ctx: SelectionContext) -> str | None:
    if depth is None:
        return f"made for {', '.join(kernel.device)}; this is {ctx.device.path}"
    if ctx.kv_layout not in kernel.kv_layouts:
        return f"reads pool layouts {', '.join(kernel.kv_layouts)}; the pool's is {ctx.kv_layout}"
    if ctx.deterministic and BATCH_INVARIANT not in kernel.features:
        return f"not {BATCH_INVARIANT}, which --deterministic asks for"
    if ctx.deterministic and kernel.tokens is not None:
        return "a variant by T; --deterministic asks for one kernel at every T"
    return _own_reason(kernel, ctx) if kernel.supports is not None else None


def _own_reason(kernel: Kernel, ctx: SelectionContext) -> str | None:
    assert kernel.supports is not None
    try:
        reason: object = kernel.supports(ctx)
    except Exception as e:
        raise PluginError(
            f"supports() of kernel {kernel_title(kernel)} raised at {ctx.site.op} in {ctx.site.layer}: {type(e).__name__}: {e};"
            f" it must return None or a reason. Until it is repaired, run with --kernel {ctx.site.op}=PROVIDER of another"
        ) from e
    if reason is None or (isinstance(reason, str) and reason):
        return reason
    raise PluginError(
        f"supports() of kernel {kernel_title(kernel)} returned {reason!r}; it must return None or a reason"
    )
