"""What `tune --providers` compares: the model as it is bound, and as it would be under --kernel with each other provider of an op."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.discovery import did_you_mean
from sglang_core.backend.kernel import OpSite
from sglang_core.backend.selection import OpTable, parse_overrides
from sglang_core.bench.calls import COMPARED, build
from sglang_core.bench.checks import graph_safe
from sglang_core.bench.op_calls import OpCall, Operands, Step
from sglang_core.bench.places import bound_at, passed_over, places, provider_of, runners
from sglang_core.config import EngineConfig
from sglang_core.engine.explain import bound_model
from sglang_core.engine.resolve import Resolved, resolve
from sglang_core.errors import ConfigError, SglangError
from sglang_core.ops import OPS


@dataclass(frozen=True, kw_only=True)
class Contender:
    """The model under one provider of the op. `name` is what --kernel calls it; of the one in force, who runs at its places."""

    name: str
    table: OpTable

    def call(self, make: Operands, site: OpSite, step: Step) -> OpCall:
        return build(COMPARED[site.op], replace(make, table=self.table), bound_at(self.table, site), step)

    def graph_safe(self, site: OpSite) -> bool:
        """Whether a graph may hold what runs there. Of bodies nobody says so."""
        kernels = [kernel for _, kernel in runners(self.table, bound_at(self.table, site))]
        return all(kernel is not None and graph_safe([kernel]) for kernel in kernels)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is to be compared. `refused`: providers that may not run here, and why."""

    op: str
    resolved: Resolved
    sites: Sequence[OpSite]
    in_force: Contender
    others: Sequence[Contender]
    refused: Mapping[str, str]
    overrides: Mapping[str, str]  # the user's own
    context: int
    notes: Sequence[str] = ()

    def steps(self, token_counts: Sequence[int]) -> Iterator[tuple[OpSite, Step]]:
        for site in self.sites:
            for tokens in token_counts:
                for step in COMPARED[site.op].steps(tokens, self.context):
                    yield site, step

    def flags(self, provider: str) -> str:
        """What to serve with, for this provider and what the user asked for already."""
        asked = {**self.overrides, self.op: provider}
        return " ".join(f"--kernel {op}={name}" for op, name in asked.items())


def plan_comparison(
    config: EngineConfig, op: str, names: Sequence[str], *, context: int, device: ChosenDevice | None = None
) -> Comparison:
    """Bind the model once as it is, and once for each provider of the op (`names`; all where there are none). Opens no device.

    `device` stands for the config's. Raises ConfigError where the op is none, is not in the model, or a name is no provider's.
    """
    if op not in COMPARED:
        known = "is one of which no calls are built" if op in OPS else f"is no op{did_you_mean(op, COMPARED)}"
        raise ConfigError(f"--op {op} {known}; providers can be compared of {', '.join(COMPARED)}")
    resolved = resolve(config, device)
    table, _ = bound_model(resolved)
    bound = {b.site.op for b in table.bound_ops}
    overrides = parse_overrides(config.device.kernel)
    tables, refused = _tables(resolved, config, op, _chosen(table, op, names), overrides)
    sites = places([table, *tables.values()], op)
    if not sites:
        there = sorted(bound & COMPARED.keys())
        raise ConfigError(f"{config.model.model_path} has no {op}; providers can be compared of {', '.join(there)}")
    notes = [f"{whole} is made of it too, and is not compared" for whole in passed_over(table, op)]
    if not any(op in (called, *OPS[called].parts.values()) for called in bound):
        notes.append(f"no layer calls {op} by itself: --kernel {op}=PROVIDER changes nothing in serving")
    seen = {_signature(table, sites): "the one in force"}
    others = []
    for name, own in tables.items():
        try:
            signature = _signature(own, sites)
        except SglangError as error:
            refused[name] = getattr(error, "why", str(error))
            continue
        if (same := seen.setdefault(signature, f"the same as {name}")) == f"the same as {name}":
            others.append(Contender(name=name, table=own))
        elif same != "the one in force":
            notes.append(f"{name} is {same}")
    running = dict.fromkeys(provider_of(table, bound_at(table, site), op) for site in sites)
    return Comparison(
        op=op,
        resolved=resolved,
        sites=sites,
        in_force=Contender(name=" + ".join(running), table=table),
        others=others,
        refused=refused,
        overrides=overrides,
        context=min(context, resolved.context_length),
        notes=notes,
    )


def _chosen(table: OpTable, op: str, names: Sequence[str]) -> list[str]:
    known = table.providers(op)
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"--providers {unknown[0]} has no {op}{did_you_mean(unknown[0], known)}; it is provided by {', '.join(known)}"
        )
    return [name for name in known if not names or name in names]


def _tables(
    resolved: Resolved, config: EngineConfig, op: str, names: Sequence[str], overrides: Mapping[str, str]
) -> tuple[dict[str, OpTable], dict[str, str]]:
    """The model's ops under --kernel OP=NAME, by name; and of those that it refuses, the reason."""
    tables, refused = {}, {}
    for name in names:
        flags = tuple(f"{other}={provider}" for other, provider in {**overrides, op: name}.items())
        under = EngineConfig.from_flat(**{**config.flat(), "kernel": flags})
        try:
            tables[name], _ = bound_model(resolve(under, resolved.device))
        except SglangError as error:
            refused[name] = getattr(error, "why", str(error))
    return tables, refused


def _signature(table: OpTable, sites: Sequence[OpSite]) -> tuple[object, ...]:
    """Equal where the same kernels run at all places."""
    found = (runners(table, bound_at(table, site)) for site in sites)
    return tuple(tuple((name, kernel and kernel.fn) for name, kernel in each) for each in found)
