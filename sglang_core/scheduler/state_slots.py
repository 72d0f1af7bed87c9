"""Where a req's recurrent state is read and written, step by step.

A step reads one slot and writes another, so nothing is lost by a step that turns out void. The state after a whole number of
pages is kept until a later one is committed: it is what the prefix tree takes when the req ends or its prompt is computed. It
costs no copy, as the next step just writes elsewhere.
"""

from __future__ import annotations

NO_STATE = 0  # the scratch slot: who reads it begins from zeros


def num_state_slots(max_in_flight: int, *, cached: bool) -> int:
    """Slots that a req owns while it runs: one to read and one to write, and where prefixes are cached a kept one.

    A state that is kept makes way once a later one is committed, so at most `max_in_flight` of them are kept beside one to write.
    """
    return max(3, max_in_flight + 1) if cached else 2


class StateSlots:
    """The slots of one running req."""

    def __init__(self, owned: list[int], page_size: int, *, shared: int = NO_STATE, keep: bool = True) -> None:
        """owned: slots to write to. shared: the tree's, with the state that the req begins from."""
        self._page_size = page_size
        self._keep = keep
        self._spare = owned
        self._shared = self._tail = shared
        self._kept: list[tuple[int, int]] = []  # (tokens, slot) of states after whole pages, the earliest first

    def step(self, stop: int) -> tuple[int, int]:
        """Slots that a step up to token `stop` reads and writes."""
        read, write = self._tail, self._spare.pop()
        if read not in (NO_STATE, self._shared) and all(slot != read for _, slot in self._kept):
            self._spare.append(read)
        if self._keep and stop % self._page_size == 0:
            self._kept.append((stop, write))
        self._tail = write
        return read, write

    def committed(self, num_tokens: int) -> None:
        """So many tokens hold: an earlier state than the last one kept up to there is of no use."""
        while len(self._kept) > 1 and self._kept[1][0] <= num_tokens:
            self._spare.append(self._kept.pop(0)[1])

    def snapshot(self, num_tokens: int) -> list[int]:
        """The slot with the state after `num_tokens` committed tokens, if it was kept and is the req's own."""
        return [slot for tokens, slot in self._kept[:1] if tokens == num_tokens]

    def share(self, slot: int) -> None:
        """The tree took the snapshot. The caller brings a slot in its place with `add`."""
        assert self._kept[0][1] == slot
        del self._kept[0]
        self._shared = slot

    def add(self, slot: int) -> None:
        self._spare.append(slot)

    @property
    def owned(self) -> list[int]:
        tail = [] if self._tail in (NO_STATE, self._shared) else [self._tail]
        return list({*self._spare, *(slot for _, slot in self._kept), *tail})
