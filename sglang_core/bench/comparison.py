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
    """The model under one provider of the op. `name` is what --kernel calls it; of the one in force, who runs at its places. `asked`: how --kernel asks for it."""

    name: str
    table: OpTable
    asked: Mapping[str, str]

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

    def differs(self, other: Contender, site: OpSite) -> bool:
        """Whether it runs other kernels there than the one in force: not where it is asked for in some formats alone."""
        return _signature(other.table, [site]) != _signature(self.in_force.table, [site])

    def flags(self, provider: str) -> str:
        """What to serve with, for this provider and what the user asked for already."""
        asked = {**self.overrides, **next(other.asked for other in self.others if other.name == provider)}
        return _flags(asked)


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
    contenders, refused = _contenders(resolved, config, op, _chosen(table, op, names), overrides, table)
    sites = places([table, *(each.table for each in contenders)], op)
    if not sites:
        there = sorted(bound & COMPARED.keys())
        raise ConfigError(f"{config.model.model_path} has no {op}; providers can be compared of {', '.join(there)}")
    notes = [f"{whole} is made of it too, and is not compared" for whole in passed_over(table, op)]
    if not any(op in (called, *OPS[called].parts.values()) for called in bound):
        notes.append(f"no layer calls {op} by itself: --kernel {op}=PROVIDER changes nothing in serving")
    seen = {_signature(table, sites): "the one in force"}
    others = []
    for each in contenders:
        name = each.name
        try:
            signature = _signature(each.table, sites)
        except SglangError as error:
            refused[name] = getattr(error, "why", str(error))
            continue
        if (same := seen.setdefault(signature, f"the same as {name}")) == f"the same as {name}":
            others.append(each)
            if op not in each.asked:
                notes.append(
                    f"{name} is compared where it may run, with {_flags(each.asked)}: it is refused {refused.pop(name)}"
                )
        elif same != "the one in force":
            notes.append(f"{name} is {same}")
    running = dict.fromkeys(provider_of(table, bound_at(table, site), op) for site in sites)
    return Comparison(
        op=op,
        resolved=resolved,
        sites=sites,
        in_force=Contender(name=" + ".join(running), table=table, asked={}),
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


def _contenders(
    resolved: Resolved,
    config: EngineConfig,
    op: str,
    names: Sequence[str],
    overrides: Mapping[str, str],
    in_force: OpTable,
) -> tuple[list[Contender], dict[str, str]]:
    """The model under --kernel OP=NAME; under OP[FORMAT]=NAME for the formats that it takes, where others refuse it. And of what is refused, the reason."""
    formats = dict.fromkeys(bound.site.fmt for bound in in_force.bound_ops if bound.site.op == op)
    found: list[Contender] = []
    refused: dict[str, str] = {}

    def under(asked: Mapping[str, str]) -> OpTable:
        flags = tuple(f"{which}={provider}" for which, provider in {**overrides, **asked}.items())
        return bound_model(resolve(EngineConfig.from_flat(**{**config.flat(), "kernel": flags}), resolved.device))[0]

    def takes(asked: Mapping[str, str]) -> bool:
        try:
            under(asked)
        except SglangError:
            return False
        return True

    for name in names:
        asked = {op: name}
        try:
            found.append(Contender(name=name, table=under(asked), asked=asked))
        except SglangError as error:
            refused[name] = getattr(error, "why", str(error))
            each = [{f"{op}[{fmt}]": name} for fmt in formats] if len(formats) > 1 else []
            if taken := {which: name for one in each if takes(one) for which in one}:
                found.append(Contender(name=name, table=under(taken), asked=taken))
    return found, refused


def _flags(asked: Mapping[str, str]) -> str:
    return " ".join(f"--kernel {which}={provider}" for which, provider in asked.items())


def _signature(table: OpTable, sites: Sequence[OpSite]) -> tuple[object, ...]:
    """Equal where the same kernels run at all places."""
    found = (runners(table, bound_at(table, site)) for site in sites)
    return tuple(tuple((name, kernel and kernel.fn) for name, kernel in each) for each in found)
