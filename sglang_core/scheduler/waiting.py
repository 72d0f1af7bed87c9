"""The waiting queue: arrival order underneath, a policy's order on top, and a bound on how often that passes anyone over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sglang_core.scheduler.policy import Policy
from sglang_core.types import Req, ReqStatus


class WaitingQueue:
    """Waiting reqs, oldest first. A req with holds keeps its place and is not offered."""

    def __init__(self, policy: Policy, fair_every: int) -> None:
        self._policy = policy
        self._fair_every = fair_every
        self._reqs: dict[str, Req] = {}
        self._passes = 0  # reqs that started since the oldest one of the queue did

    def __len__(self) -> int:
        return len(self._reqs)

    def __iter__(self) -> Iterator[Req]:
        return iter(self._reqs.values())

    @property
    def has_ready(self) -> bool:
        return next(self._ready(), None) is not None

    def add(self, req: Req) -> None:
        self._reqs[req.rid] = req

    def put_back(self, reqs: Iterable[Req]) -> None:
        """Take retracted reqs in again, at the place of their arrival."""
        back = {req.rid: req for req in reqs}
        for req in back.values():
            req.status = ReqStatus.WAITING
        self._reqs = {req.rid: req for req in sorted((back | self._reqs).values(), key=lambda req: req.arrival)}

    def discard(self, req: Req) -> None:
        self._reqs.pop(req.rid, None)

    def candidates(self) -> Iterator[Req]:
        """Reqs that may start, in the order to try them. The queue must not change meanwhile.

        Every `fair_every` starts the oldest comes first; if it does not fit, nobody passes it until it does. So a req with
        k older ones starts after at most about (k + 1) * fair_every others, under any policy and load.
        """
        ordered = self._policy.order(self._ready())
        if self._passes < self._fair_every:
            return ordered
        return self._oldest_first(ordered)

    def is_due(self, req: Req) -> bool:
        """Whether so many passed this req, the oldest, that nobody may do so any more."""
        return self._passes >= self._fair_every and req is next(self._ready(), None)

    def started(self, req: Req) -> None:
        """The req left the queue for a slot."""
        self._passes = 0 if req is next(self._ready(), None) else self._passes + 1
        del self._reqs[req.rid]

    def _ready(self) -> Iterator[Req]:
        return (req for req in self._reqs.values() if not req.holds)

    def _oldest_first(self, ordered: Iterator[Req]) -> Iterator[Req]:
        oldest = next(self._ready(), None)
        if oldest is not None:
            yield oldest
        for req in ordered:
            if req is not oldest:
                yield req
