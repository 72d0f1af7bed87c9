"""Whom to send back to waiting when pages run out."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_core.types import Req

MAX_RETRACTIONS = 4  # after so many a req goes last, whatever its priority: it must end some day


def retraction_order(running: Iterable[Req]) -> list[Req]:
    """Running reqs, the first to retract first: lowest priority, then newest. The last one is never retracted.

    The oldest keeps its pages, so some req always makes progress, and one req alone always fits (intake saw to that).
    """
    return sorted(running, key=lambda req: (req.num_retractions >= MAX_RETRACTIONS, _rank(req), -req.arrival))


def _rank(req: Req) -> int:
    return 0 if req.num_retractions >= MAX_RETRACTIONS else req.priority
