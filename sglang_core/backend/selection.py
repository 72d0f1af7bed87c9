"""`OpTable`: for each site of a model, the kernel that runs there, and why. Made once a model; nothing here is per step."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

from sglang_core.backend.binding import bind_kernels, import_target
from sglang_core.backend.candidates import Refusals, kernel_title
from sglang_core.backend.claims import Claims, Support
from sglang_core.backend.interface import Backend, DeviceInfo, KernelContext
from sglang_core.backend.kernel import Kernel, OpSite, SelectionContext
from sglang_core.backend.offers import GroupOffer, Offer, group_offer, winner
from sglang_core.backend.providers import Providers, collect_kernels
from sglang_core.errors import ConfigError, KernelSelectionError, PluginError

logger = logging.getLogger(__name__)

REFERENCE = "reference"  # the op's body
DECOMPOSED = "decomposed"  # a composite's body over the kernels of its parts
CANONICAL = "canonical"


class OpLike(Protocol):
    """What selection needs of an op's definition; `sglang_core.ops.registry.OpDef` is one."""

    @property
    def body(self) -> Callable[..., Any]: ...
    @property
    def strict(self) -> bool: ...
    @property
    def host(self) -> bool: ...
    @property
    def weighted(self) -> bool: ...
    @property
    def parts(self) -> Mapping[str, str]: ...
    def decompose(self, bind: Callable[[str], Callable[..., Any]]) -> Callable[..., Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundOp:
    """The answer at one site. `fn` is what a layer calls; `pack` and `unpack` belong to it."""

    site: OpSite
    fn: Callable[..., Any]
    provider: str
    reason: str
    kernels: tuple[Kernel, ...] = ()  # empty: the op's body; several: variants by T
    refused: Refusals = ()
    fallback: bool = False
    pack: Callable[..., Any] | None = None
    unpack: Callable[..., Any] | None = None
    dequantized: bool = False  # `fn` takes dense weights: the layer dequantises those of `site.fmt` as they load

    @property
    def packed_layout(self) -> str:
        """The name of what `pack` makes, as its kernel states it; empty where there is none."""
        return self.kernels[0].packed_layout if self.kernels else ""


NONE: Mapping[str, BoundOp] = MappingProxyType({})
Instrument = Callable[[BoundOp], BoundOp]  # puts something around `fn`, as a profiler's clock


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainRow:
    """One line of `explain`: an op of a layer class, who runs it, why, and why each other candidate does not."""

    op: str
    layer: str
    fmt: str
    dtype: str
    provider: str
    why: str
    refused: Refusals
    fallback: bool
    dequantized: bool = False  # weights come in `fmt` and are dense in memory
    kernels: tuple[str, ...] = ()  # "module:function" of each variant; empty where the body runs


class OpTable:
    """The bound ops of one model on one device."""

    def __init__(
        self,
        device: DeviceInfo,
        backend: Backend,
        *,
        ops: Mapping[str, OpLike],
        kernels: Iterable[Kernel] | None = None,
        claims: Claims | None = None,
        overrides: Mapping[str, str] | None = None,
        fallback: str = "auto",
        quant_fallback: str = "auto",
        deterministic: bool = False,
        page_size: int = 0,
        kv_layout: str = "auto",
        instrument: Instrument | None = None,
    ) -> None:
        """By default `kernels` are the backend's and every installed provider's, `claims` the backend's own.

        `kv_layout` "auto" takes what the kernels prefer. `quant_fallback` is the policy of `bind_weight`.

        Raises PluginError where a kernel or claim is malformed, KernelSelectionError where an override names an unknown.
        """
        ctx = KernelContext(device=device)
        self.device, self.backend, self.ops = device, backend, ops
        self.claims = backend.claims(ctx) if claims is None else claims
        self.overrides, self.fallback, self.quant_fallback = dict(overrides or {}), fallback, quant_fallback
        self.deterministic, self.page_size, self.kv_layout = deterministic, page_size, kv_layout
        self._kernels: dict[str, dict[str, list[Kernel]]] = {}  # op -> provider -> its kernels
        for kernel in collect_kernels(backend, ctx, Providers()) if kernels is None else kernels:
            kernel = kernel if kernel.provider else replace(kernel, provider=backend.name)
            _check_kernel(kernel, ops)
            self._kernels.setdefault(kernel.op, {}).setdefault(kernel.provider, []).append(kernel)
        for claim in self.claims.claims:
            if claim.op != "*" and claim.op not in ops:
                raise PluginError(f"backend {backend.name!r} claims an op that is none: {_unknown_op(claim.op, ops)}")
        for which, provider in self.overrides.items():
            self._check_override(which, provider)
        self._instrument = instrument
        self._layouts: dict[str, str] = {}  # pool -> layout, once a kernel was chosen for it
        self._bound: dict[object, tuple[BoundOp, ...]] = {}

    def bind(self, site: OpSite) -> BoundOp:
        """The kernel for a site: override, then longest device path, then priority; else the body, as claims allow.

        Raises KernelSelectionError on a tie, a refused override, a fallback that is not allowed, and what is unsupported.
        """
        return self._memo((site,), None)[0]

    def bind_weight(self, site: OpSite, *, dense_only: str = "", online: bool = False) -> BoundOp:
        """Bind an op whose weights come in `site.fmt`. `dense_only` is why the layer needs them dense, where it does.

        `online`: they are quantised while loading, for their size alone: "auto" then never dequantises what can run packed.

        A kernel that takes the format comes first. Where there is none, `quant_fallback` decides: "dequantize" binds the site
        for dense weights, and the layer dequantises its own as they load; "reference" runs the body on packed weights; "error"
        raises KernelSelectionError. "auto" dequantises where the backend has a kernel for dense weights here, or cannot run
        the format at all. A format that is claimed natively and refused is a fallback: then `--fallback` decides.
        """
        why = "" if site.fmt == "dense" else self._why_dequantize(site, dense_only, online)
        if not why:
            return self.bind(site)
        key = ("dequantized", _site_key(site))
        if key not in self._bound:
            bound = replace(self._select((replace(site, fmt="dense"),), None)[0], site=site, dequantized=True)
            bound = replace(bound, reason=f"{why}; with weights dequantised at load, {bound.reason}")
            self._bound[key] = (bound,)
        return self._bound[key][0]

    def _why_dequantize(self, site: OpSite, dense_only: str, online: bool) -> str:
        """Why the weights of a site are dequantised at load; empty where they stay packed. Raises as `bind_weight`."""
        asked_for_body = self._asked(site) == REFERENCE
        if not dense_only and (asked_for_body or self.has_kernel(site)):
            return ""
        why = dense_only or f"no kernel of {self.backend.name!r} takes {site.fmt}"
        match self.quant_fallback:
            case "error":
                raise KernelSelectionError(
                    f"{_title(site)}: {why}; set --quant-fallback dequantize (dense weights take more memory) or reference "
                    "(slow), or take a checkpoint in another format"
                )
            case "dequantize":
                return why
        if dense_only:
            return why
        support = self.claims.support(site.op, fmt=site.fmt, dtype=site.dtype)
        if self.quant_fallback == "reference" or support is Support.NATIVE:
            return ""
        if support is Support.UNSUPPORTED:
            return why
        return why if not online and self.has_kernel(replace(site, fmt="dense")) else ""

    def has_kernel(self, site: OpSite, *, packed_as: BoundOp | None = None) -> bool:
        """Whether a kernel runs at a site, if it is bound; nothing is bound here.

        `packed_as`: and multiplies by weights as they are packed for that op.
        """
        wanted = self._asked(site)
        offers = [o for o in self._offers((site,), CANONICAL) if o.offers[0] and wanted in (None, o.provider)]
        if packed_as is None or not offers:
            return bool(offers)
        best = winner(offers)[0].lead.kernels[0]
        return any((k.pack, k.packed_layout) == (best.pack, best.packed_layout) for k in packed_as.kernels)

    def bind_group(self, sites: Sequence[OpSite], *, pool: str = "full") -> dict[str, BoundOp]:
        """Bind ops that only work together, like attn.paged, attn.plan and kv.write on one pool: op -> BoundOp.

        The most important site comes first. One provider serves all, in one pool layout; where it brings no kernel at all for
        an op, that op's body serves it. Every group of a pool gets the layout of the first: see `pool_layout`.
        """
        assert len({site.op for site in sites}) == len(sites), "a group has one site an op"
        return {bound.site.op: bound for bound in self._memo(tuple(sites), pool)}

    def providers(self, op: str) -> list[str]:
        """What --kernel may name for an op here, whether or not it runs at any site of the model."""
        return [*sorted(self._kernels.get(op, {})), REFERENCE, *([DECOMPOSED] if self.ops[op].parts else [])]

    def pool_layout(self, pool: str = "full") -> str:
        """The layout to allocate a pool with, once its groups are bound."""
        return self._settled_layout(pool) or CANONICAL

    def explain(self) -> list[ExplainRow]:
        """Every op and layer class bound so far, in the order of binding."""
        return [
            ExplainRow(
                op=b.site.op,
                layer=b.site.layer,
                fmt=b.site.fmt,
                dtype=b.site.dtype,
                provider=b.provider,
                why=b.reason,
                refused=b.refused,
                fallback=b.fallback,
                dequantized=b.dequantized,
                kernels=tuple(kernel.fn for kernel in b.kernels),
            )
            for b in self.bound_ops
        ]

    @property
    def bound_ops(self) -> list[BoundOp]:
        """Every op bound so far, in the order of binding."""
        return [b for group in self._bound.values() for b in group]

    @property
    def fallbacks(self) -> int:
        """How many ops of layer classes are claimed natively and run the body here."""
        return sum(b.fallback for b in self.bound_ops)

    def _memo(self, sites: tuple[OpSite, ...], pool: str | None) -> tuple[BoundOp, ...]:
        key = (pool, *map(_site_key, sites))
        if key not in self._bound:
            self._bound[key] = self._select(sites, pool)
        return self._bound[key]

    def _select(self, sites: tuple[OpSite, ...], pool: str | None) -> tuple[BoundOp, ...]:
        for site in sites:
            self._check_supported(site)
        bound: dict[str, BoundOp] = {}  # a composite of the group is made of those before it
        wanted = self._override_of(sites)
        if wanted == REFERENCE:
            for site in sites:
                bound[site.op] = self._run_body(site, "asked for with --kernel", (), beside=bound)
            return tuple(bound.values())
        layout = CANONICAL if pool is None else self._settled_layout(pool)
        offers = self._offers(sites, layout)
        refused = [tuple(row for offer in offers for row in offer.refused[i]) for i in range(len(sites))]
        accepted = [offer for offer in offers if offer.accepted and wanted in (None, offer.provider)]
        if wanted is not None and not accepted:
            raise self._override_refused(sites[0], wanted, next((o for o in offers if o.provider == wanted), None))
        if not accepted:
            for site, why_not in zip(sites, refused, strict=True):
                bound[site.op] = self._no_kernel(site, why_not, beside=bound)
            return tuple(bound.values())
        best, why = winner(accepted)
        if wanted is not None:
            why = "asked for with --kernel"
        if pool is not None:
            self._layouts[pool] = best.kv_layout
            why += f"; pool layout {best.kv_layout}"
        for i, (site, offer) in enumerate(zip(sites, best.offers, strict=True)):
            losers = [o.offers[i] for o in offers if o.accepted and o is not best]
            why_not = refused[i] + tuple(
                (kernel_title(kernel), f"outranked by {best.provider}")
                for o in losers
                if o is not None
                for kernel in o.kernels
            )
            if (asked := self._asked_apart(site, best.provider)) and offer is not None:
                why_not += tuple((kernel_title(kernel), asked) for kernel in offer.kernels)
                bound[site.op] = self._run_body(site, asked, why_not, beside=bound)
            elif offer is not None:
                bound[site.op] = self._run_kernels(site, offer, why, why_not)
            else:
                why_none = f"{best.provider!r} runs {sites[0].op} here and brings none"
                bound[site.op] = self._no_kernel(site, why_not, why_none, beside=bound)
        return tuple(bound.values())

    def _asked_apart(self, site: OpSite, provider: str) -> str:
        """The --kernel flag that a composite's kernel of this provider would pass over; empty where there is none."""
        every = (site.op, *self.ops[site.op].parts.values())
        flags = {op: asked for op in every if (asked := self._asked(site, op)) is not None}
        apart = flags.pop(site.op, None)
        if apart is None:
            return next(
                (f"--kernel {op}={other} asks for its part" for op, other in flags.items() if other != provider), ""
            )
        return "asked for with --kernel" if apart == DECOMPOSED else ""

    def _offers(self, sites: Sequence[OpSite], layout: str | None) -> list[GroupOffer]:
        """One offer a provider, in order of its name."""

        def context(site: OpSite, kv_layout: str) -> SelectionContext:
            return SelectionContext(
                device=self.device,
                site=site,
                page_size=self.page_size,
                kv_layout=kv_layout,
                deterministic=self.deterministic,
            )

        by_site = [self._kernels.get(site.op, {}) for site in sites]
        providers = sorted({provider for mine in by_site for provider in mine})
        return [group_offer(sites, [mine.get(p, []) for mine in by_site], layout, context) for p in providers]

    def _run_kernels(self, site: OpSite, offer: Offer, reason: str, refused: Refusals) -> BoundOp:
        first, fallback = offer.kernels[0], False
        for note in dict.fromkeys(kernel.note for kernel in offer.kernels if kernel.note):
            reason += f"; {note}"
        if offer.hole is not None:
            reason += f"; the body where no variant takes T, as T={offer.hole}"
            fallback = self._claimed(site)
        if fallback:
            self._apply_policy(site, f"no kernel takes T={offer.hole}")
        return self._watched(
            BoundOp(
                site=site,
                fn=bind_kernels(offer.kernels, self.ops[site.op].body),
                provider=first.provider,
                reason=reason,
                kernels=offer.kernels,
                refused=refused,
                fallback=fallback,
                pack=import_target(first, first.pack) if first.pack else None,
                unpack=import_target(first, first.unpack) if first.unpack else None,
            )
        )

    def _no_kernel(
        self, site: OpSite, refused: Refusals, why: str = "", *, beside: Mapping[str, BoundOp] = NONE
    ) -> BoundOp:
        """The body: a fallback where the backend claims the op, else simply what is not claimed."""
        if not self._claimed(site):
            return self._run_body(site, why or f"{self.backend.name!r} does not claim it", refused, beside=beside)
        why = why or (f"every kernel refuses: {_reasons(refused)}" if refused else "no kernel for it is installed")
        self._apply_policy(site, why)
        reason = f"fallback: {self.backend.name!r} claims it, but {why}"
        return self._run_body(site, reason, refused, beside=beside, fallback=True)

    def _run_body(
        self,
        site: OpSite,
        reason: str,
        refused: Refusals,
        *,
        beside: Mapping[str, BoundOp] = NONE,
        fallback: bool = False,
    ) -> BoundOp:
        """The body. A composite's runs the kernels of its parts: those bound `beside` it in its group, and others at their sites."""
        op = self.ops[site.op]
        fn, provider, packs = op.body, REFERENCE, None
        if op.parts and self._asked(site) != REFERENCE:
            sites = site.parts or tuple(replace(site, op=part) for part in op.parts.values())
            parts = {part.op: beside.get(part.op) or self.bind(part) for part in sites}
            if any(part.provider != REFERENCE for part in parts.values()):
                provider = DECOMPOSED
                reason += "; made of " + ", ".join(f"{name} ({part.provider})" for name, part in parts.items())
            packs = next((part for name, part in parts.items() if op.weighted and self.ops[name].weighted), None)
            if provider == DECOMPOSED or site.parts:  # parts of a group are ops of their own to whoever watches them
                fn = op.decompose(lambda part: parts[part].fn if part in parts else self.ops[part].body)
        return self._watched(
            BoundOp(
                site=site,
                fn=fn,
                provider=provider,
                reason=reason,
                refused=refused,
                fallback=fallback,
                pack=packs.pack if packs else None,  # what multiplies by the weight is who packs it
                unpack=packs.unpack if packs else None,
            )
        )

    def _watched(self, bound: BoundOp) -> BoundOp:
        return bound if self._instrument is None else self._instrument(bound)

    def _claimed(self, site: OpSite) -> bool:
        return self.claims.support(site.op, fmt=site.fmt, dtype=site.dtype) is Support.NATIVE

    def _settled_layout(self, pool: str) -> str | None:
        return self._layouts.get(pool) or (None if self.kv_layout == "auto" else self.kv_layout)

    def _apply_policy(self, site: OpSite, why: str) -> None:
        """A claimed op is about to run its body: raise, warn, or let it be."""
        policy = self.fallback
        if policy == "auto":
            policy = "error" if self.ops[site.op].strict else "warn"
        message = f"{_title(site)}: {self.backend.name!r} claims it natively, but {why}"
        if policy == "error":
            raise KernelSelectionError(
                f"{message}; let the reference body run with --fallback warn, or ask for it with --kernel {site.op}={REFERENCE}"
            )
        if policy == "warn":
            logger.warning("%s; the reference body runs", message)

    def _check_supported(self, site: OpSite) -> None:
        if site.op not in self.ops:
            raise KernelSelectionError(f"{site.layer} asks for an op that is none: {_unknown_op(site.op, self.ops)}")
        if self.claims.support(site.op, fmt=site.fmt, dtype=site.dtype) is Support.UNSUPPORTED:
            raise KernelSelectionError(
                f"{_title(site)}: backend {self.backend.name!r} cannot run it with this dtype and format; set another --dtype,"
                " or take a checkpoint in another format"
            )

    def _asked(self, site: OpSite, op: str = "") -> str | None:
        """Whom --kernel asks for at a site, for its op or a part of it. What names the format of the weights comes before what does not."""
        op = op or site.op
        return self.overrides.get(f"{op}[{site.fmt}]", self.overrides.get(op))

    def _check_override(self, which: str, provider: str) -> None:
        op, _, fmt = which.removesuffix("]").partition("[")
        if op not in self.ops:
            raise KernelSelectionError(f"--kernel {which}={provider}: {_unknown_op(op, self.ops)}")
        if fmt and not self.ops[op].weighted:
            raise KernelSelectionError(f"--kernel {which}={provider}: {op} takes no weights, so no format of them")
        known = self.providers(op)
        if provider not in known:
            raise KernelSelectionError(f"--kernel {which}={provider}: {op} is provided by {', '.join(known)}")

    def check_formats_asked(self) -> None:
        """Once a model is bound. Raises KernelSelectionError where --kernel names a format that none of its layers have."""
        for which, provider in self.overrides.items():
            op, _, fmt = which.removesuffix("]").partition("[")
            there = dict.fromkeys(bound.site.fmt for bound in self.bound_ops if bound.site.op == op)
            if fmt and fmt not in there:
                found = f"there is {', '.join(there)}" if there else f"there is no {op}"
                raise KernelSelectionError(f"--kernel {which}={provider}: no layer has weights in {fmt} there; {found}")

    def _override_of(self, sites: Sequence[OpSite]) -> str | None:
        flags = {site.op: self._asked(site) or DECOMPOSED for site in sites}
        wanted = {op: provider for op, provider in flags.items() if provider != DECOMPOSED}
        if len(set(wanted.values())) > 1:
            given = " and ".join(f"--kernel {op}={provider}" for op, provider in wanted.items())
            raise KernelSelectionError(
                f"{given}: {', '.join(s.op for s in sites)} are selected together; name one provider"
            )
        return next(iter(wanted.values()), None)

    def _override_refused(self, site: OpSite, wanted: str, offer: GroupOffer | None) -> KernelSelectionError:
        rows = tuple(row for refused in offer.refused for row in refused) if offer else ()
        reasons = "; ".join(dict.fromkeys(reason for _, reason in rows))
        which, way_out = site.op, f"name another provider, or {REFERENCE!r}"
        if (of_format := f"{site.op}[{site.fmt}]") in self.overrides:
            which = of_format
        elif self.ops[site.op].weighted:
            way_out += f", or ask for it where weights have a format, --kernel {site.op}[FORMAT]={wanted}"
        return KernelSelectionError(
            f"--kernel {which}={wanted} is refused at {_title(site)}: {_reasons(rows)}; {way_out}",
            why=f"at {_title(site)}: {reasons}",
        )


def parse_overrides(flags: Iterable[str]) -> dict[str, str]:
    """["attn.paged=triton", "gemm.linear[fp8.block128]=hopper"] -> by what is before the =. Raises ConfigError on what has another form, or is given twice."""
    found: dict[str, str] = {}
    for flag in flags:
        op, equals, provider = flag.partition("=")
        if not (equals and provider and re.fullmatch(r"[\w.]+(\[[\w.-]+\])?", op)):
            raise ConfigError(
                f"--kernel {flag!r} is not OP=PROVIDER or OP[FORMAT]=PROVIDER, as in attn.paged={REFERENCE} or gemm.linear[dense]={REFERENCE}"
            )
        if found.setdefault(op, provider) != provider:
            raise ConfigError(f"--kernel names two providers for {op}: {found[op]} and {provider}; give one")
    return found


def _check_kernel(kernel: Kernel, ops: Mapping[str, OpLike]) -> None:
    """Raises PluginError on a kernel that could never run as written."""
    low, high = kernel.tokens or (1, None)
    problem = ""
    if kernel.op not in ops:
        problem = f"names an op that is none: {_unknown_op(kernel.op, ops)}"
    elif kernel.provider in (REFERENCE, DECOMPOSED):
        problem = f"may not be of provider {kernel.provider!r}, which means the op's body; name it after the plugin"
    elif not all(
        ":" in target for target in (kernel.fn, kernel.pack, kernel.unpack, kernel.tune) if target is not None
    ):
        problem = "must give fn, pack, unpack and tune as 'module:function'"
    elif kernel.packed_layout and kernel.pack is None:
        problem = f"names a packed_layout, {kernel.packed_layout!r}, and has no pack"
    elif isinstance(kernel.device, str) or not kernel.device or isinstance(kernel.kv_layouts, str):
        problem = "must give device and kv_layouts as tuples of names, like device=('acme',)"
    elif low < 1 or (high is not None and high < low):
        problem = f"has tokens={kernel.tokens}; it must be (low, high) with 1 <= low <= high, or (low, None)"
    if problem:
        raise PluginError(f"kernel {kernel_title(kernel)} for {kernel.op!r} {problem}")


def _unknown_op(op: str, ops: Mapping[str, OpLike]) -> str:
    near = difflib.get_close_matches(op, ops, n=1)
    return f"there is no op {op!r}" + (
        f"; did you mean {near[0]!r}?" if near else f"; the ops are {', '.join(sorted(ops))}"
    )


def _site_key(site: OpSite) -> tuple[object, ...]:
    parts = tuple(_site_key(part) for part in site.parts)
    return site.op, site.layer, site.dtype, site.fmt, site.spec, tuple(sorted(site.dims.items())), parts


def _title(site: OpSite) -> str:
    fmt = "" if site.fmt == "*" else f", {site.fmt}"
    return f"{site.op} in {site.layer} ({site.dtype}{fmt})"


def _reasons(refused: Refusals) -> str:
    return "; ".join(f"{kernel}: {reason}" for kernel, reason in refused)
