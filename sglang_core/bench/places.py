"""Where a model calls an op, and what runs there under the --kernel flags of each provider: what `tune --providers` compares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sglang_core.backend.kernel import Kernel, OpSite
from sglang_core.backend.selection import DECOMPOSED, BoundOp, OpTable
from sglang_core.bench.calls import COMPARED
from sglang_core.bench.op_calls import grouped_of_fused
from sglang_core.ops import OPS


def places(tables: Sequence[OpTable], op: str) -> list[OpSite]:
    """Sites of an op, and of what is made of it: where one provider runs the whole and another its parts, the whole is compared."""
    sites = list({_key(b.site): b.site for table in tables for b in table.bound_ops if b.site.op in COMPARED}.values())
    # What layers leave to a whole they do not call themselves, though it may be bound.
    inner = {_key(part) for site in sites for part in site.parts}
    called = [site for site in sites if not inner & {_key(site), *(_key(part) for part in _implied(site))}]
    alone = [site for site in called if site.op == op]
    if op == "gemm.grouped" and not alone:  # no layer calls it by itself
        experts = [bound for bound in tables[0].bound_ops if bound.site.op == "moe.fused"]
        alone = [part.site for bound in experts for part in grouped_of_fused(tables[0], bound)]
    return alone + [site for site in called if op in _parts(site)]


def passed_over(table: OpTable, op: str) -> list[str]:
    """Ops of the model that are made of this one, and of which no calls can be built."""
    return sorted({b.site.op for b in table.bound_ops if op in _parts(b.site)} - COMPARED.keys())


def bound_at(table: OpTable, site: OpSite) -> BoundOp:
    """What the model calls there. What it has in parts alone is put together of them. Raises KernelSelectionError."""
    found = next((b for b in table.bound_ops if b.site == site), None)
    if found is not None:
        return found
    if not site.parts:
        return table.bind(site)
    parts = {part.op: bound_at(table, part) for part in site.parts}
    op = OPS[site.op]
    packs = next((part for name, part in parts.items() if op.weighted and OPS[name].weighted), None)
    return BoundOp(
        site=site,
        fn=op.decompose(lambda name: parts[name].fn if name in parts else OPS[name].body),
        provider=DECOMPOSED,
        reason="its parts are called",
        pack=packs.pack if packs else None,
        unpack=packs.unpack if packs else None,
        dequantized=packs is not None and packs.dequantized,
    )


def runners(table: OpTable, bound: BoundOp) -> list[tuple[str, Kernel | None]]:
    """Provider and kernel of all that runs at a place; None is a body."""
    if bound.provider == DECOMPOSED:
        return [runner for part in _part_sites(bound.site) for runner in runners(table, bound_at(table, part))]
    kernels: Iterable[Kernel | None] = bound.kernels or (None,)
    return [(bound.provider, kernel) for kernel in kernels]


def provider_of(table: OpTable, bound: BoundOp, op: str) -> str:
    """Who runs the op at a place that is its own, or made of it."""
    if bound.site.op == op or bound.provider != DECOMPOSED:
        return bound.provider
    return next(bound_at(table, part).provider for part in _part_sites(bound.site) if part.op == op)


def _parts(site: OpSite) -> list[str]:
    return [part.op for part in _part_sites(site)]


def _part_sites(site: OpSite) -> Sequence[OpSite]:
    return site.parts or _implied(site)


def _implied(site: OpSite) -> list[OpSite]:
    """Where the parts of a composite are that names no places of theirs: at its own facts."""
    return [] if site.parts else [replace(site, op=part) for part in OPS[site.op].parts.values()]


def _key(site: OpSite) -> str:
    return repr(site)  # `dims` cannot be hashed
