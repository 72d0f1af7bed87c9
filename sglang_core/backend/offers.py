"""What each provider would run at a site, or at several sites that must share it, and which provider comes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_core.backend.candidates import Candidate, Rank, Refusals, judge, kernel_title, tie
from sglang_core.backend.kernel import Kernel, OpSite, SelectionContext

NO_KERNEL: Rank = (-2, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """One provider at one site: one kernel, or variants by T in the order in which they are tried.

    `hole` is a T that no variant takes, so that the op's body stands in there.
    """

    first: Candidate
    kernels: tuple[Kernel, ...]
    hole: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupOffer:
    """One provider at sites that are selected together. An offer is None where the op's body serves its kernels."""

    provider: str
    kv_layout: str
    accepted: bool
    offers: tuple[Offer | None, ...]
    refused: tuple[Refusals, ...]

    @property
    def ranks(self) -> tuple[Rank, ...]:
        return tuple(NO_KERNEL if offer is None else offer.first.rank for offer in self.offers)

    @property
    def lead(self) -> Offer:
        return next(offer for offer in self.offers if offer is not None)


def group_offer(
    sites: Sequence[OpSite],
    kernels: Sequence[Sequence[Kernel]],
    kv_layout: str | None,
    context: Callable[[OpSite, str], SelectionContext],
) -> GroupOffer:
    """What one provider, with `kernels` per site, would run under the first pool layout that suits all of them.

    `kv_layout` is the pool's where it is settled. Raises KernelSelectionError where two of its kernels rank equally.
    """
    by_priority = sorted((k for mine in kernels for k in mine), key=lambda k: (-k.priority, k.fn))
    layouts = [kv_layout] if kv_layout else list(dict.fromkeys(name for k in by_priority for name in k.kv_layouts))
    tried = [_offer_in(layout, sites, kernels, context) for layout in layouts]
    return next((offer for offer in tried if offer.accepted), tried[0])


def _offer_in(
    layout: str,
    sites: Sequence[OpSite],
    kernels: Sequence[Sequence[Kernel]],
    context: Callable[[OpSite, str], SelectionContext],
) -> GroupOffer:
    offers: list[Offer | None] = []
    refused: list[Refusals] = []
    accepted = True
    for site, mine in zip(sites, kernels, strict=True):
        offer, why_not = site_offer([judge(kernel, context(site, layout)) for kernel in mine])
        if offer is not None and offers and offers[0] is None and site.op.endswith("plan"):
            reason = f"a plan is private to its own {sites[0].op}, and it brings none that runs here"
            offer, why_not = None, (*why_not, (kernel_title(mine[0]), reason))
        # A composite that is refused is taken apart into the group's other ops, which its provider runs.
        accepted = accepted and (offer is not None or not mine or bool(site.parts))
        offers.append(offer)
        refused.append(why_not)
    provider = next(k.provider for mine in kernels for k in mine)
    return GroupOffer(
        provider=provider, kv_layout=layout, accepted=accepted, offers=tuple(offers), refused=tuple(refused)
    )


def site_offer(candidates: Sequence[Candidate]) -> tuple[Offer | None, Refusals]:
    """One provider's offer at one site, and why its other kernels are not in it."""
    refused = [(c.title, c.refusal) for c in sorted(candidates, key=lambda c: c.title) if c.refusal is not None]
    accepted = sorted((c for c in candidates if c.refusal is None), key=_first_tried)
    if not accepted:
        return None, tuple(refused)
    first, chosen = accepted[0], list[Candidate]()
    for c in accepted:
        if any(other.rank == c.rank and _overlap(other.kernel, c.kernel) for other in chosen):
            raise tie(next(o for o in chosen if o.rank == c.rank and _overlap(o.kernel, c.kernel)), c)
        if chosen and chosen[-1].kernel.tokens is None:
            refused.append((c.title, f"outranked by {chosen[-1].title}"))
        elif (c.kernel.pack, c.kernel.unpack) != (first.kernel.pack, first.kernel.unpack):
            refused.append((c.title, f"packs weights otherwise than {first.title}, and variants share one pack"))
        else:
            chosen.append(c)
    kernels = tuple(c.kernel for c in chosen)
    hole = _hole(kernels)
    if hole is not None and first.kernel.pack is not None:
        reason = f"no variant takes T={hole}, and the op's body cannot read the weights it packs"
        return None, (*refused, *((c.title, reason) for c in chosen))
    return Offer(first=first, kernels=kernels, hole=hole), tuple(refused)


def winner(offers: Sequence[GroupOffer]) -> tuple[GroupOffer, str]:
    """The accepted offer that ranks first, site by site, and why in words. Raises KernelSelectionError on a tie."""
    best, *others = sorted(offers, key=lambda o: o.ranks, reverse=True)
    length, priority = best.lead.first.rank
    if not others:
        return best, "the only kernel that may run here"
    if others[0].ranks == best.ranks:
        raise tie(best.lead.first, others[0].lead.first)
    if length > others[0].lead.first.rank[0]:
        return best, f"longest device path ({length} segment{'s' if length != 1 else ''})"
    return best, f"highest priority ({priority})"


def _first_tried(c: Candidate) -> tuple[int, int, bool, int, str]:
    """Rank first; then a range of T before none; the rest only makes the order independent of registration."""
    tokens = c.kernel.tokens
    return -c.rank[0], -c.rank[1], tokens is None, tokens[0] if tokens else 0, c.title


def _overlap(a: Kernel, b: Kernel) -> bool:
    """Whether two kernels of one rank would both be first for some T."""
    if a.tokens is None or b.tokens is None:
        return a.tokens is b.tokens
    (a_low, a_high), (b_low, b_high) = a.tokens, b.tokens
    return (b_high is None or a_low <= b_high) and (a_high is None or b_low <= a_high)


def _hole(kernels: Sequence[Kernel]) -> int | None:
    """The smallest T from 1 that none of the kernels takes; None where they take every T."""
    t = 1
    if any(k.tokens is None for k in kernels):
        return None
    for low, high in sorted((k.tokens for k in kernels if k.tokens is not None), key=lambda r: r[0]):
        if low > t:
            break
        if high is None:
            return None
        t = max(t, high + 1)
    return t
