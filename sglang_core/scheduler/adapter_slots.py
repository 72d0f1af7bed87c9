"""Which adapter is in which slot of the device, and who may start: host integers only. The runner does what it says, step by step."""

from __future__ import annotations

from collections import Counter

from sglang_core.errors import RequestError
from sglang_core.types import AdapterWrite

NO_SLOT = -1


class AdapterSlots:
    """A slot belongs to one adapter as long as running reqs use it; then it is kept until another adapter needs it, the one
    that was used least recently first. Pinned adapters keep their slot.

    Adapters are named by key, name@version: other weights are another adapter.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slots: dict[str, int] = {}  # resident adapters, least recently used first
        self._free = list(range(num_slots - 1, -1, -1))
        self._users: Counter[str] = Counter()  # running reqs by adapter
        self._pinned: set[str] = set()
        self._writes: list[AdapterWrite] = []  # not in a plan yet
        self.num_writes = 0

    @property
    def num_resident(self) -> int:
        return len(self._slots)

    def has_room(self, adapter: str) -> bool:
        """Whether a req with this adapter may start now."""
        return not adapter or adapter in self._slots or bool(self._free) or self._victim() is not None

    def acquire(self, adapter: str) -> int:
        """The slot of a req that starts; its adapter is written there with the plan of its step. Has room, see above."""
        if not adapter:
            return NO_SLOT
        slot = self._slots.pop(adapter, None)
        if slot is None:
            slot = self._slots.pop(self._evict()) if not self._free else self._free.pop()
            self._writes.append(AdapterWrite(slot=slot, adapter=adapter))
            self.num_writes += 1
        self._slots[adapter] = slot
        self._users[adapter] += 1
        return slot

    def slot(self, adapter: str) -> int:
        """Where a running req's adapter is."""
        return self._slots[adapter] if adapter else NO_SLOT

    def release(self, adapter: str) -> None:
        """A req with this adapter no longer runs. Rows of it in flight still read the slot: it is rewritten after them, in order."""
        if adapter:
            self._users[adapter] -= 1
            if not self._users[adapter]:
                del self._users[adapter]

    def take_writes(self) -> list[AdapterWrite]:
        """The slots that change hands with the next plan."""
        writes, self._writes = self._writes, []
        return writes

    def pin(self, adapter: str) -> None:
        """Never evict it. Raises RequestError where no slot would be left for the others."""
        if len(self._pinned | {adapter}) >= self.num_slots:
            raise RequestError(
                f"{len(self._pinned)} adapters are pinned, and one of {self.num_slots} slots must stay free for the others; load it "
                "unpinned, or raise --max-loras-per-batch",
                param="pinned",
            )
        self._pinned.add(adapter)

    def forget(self, adapter: str) -> None:
        """It was unloaded: nobody runs with it, and nobody will."""
        assert not self._users[adapter], "an adapter is unloaded once its last req has ended"
        self._pinned.discard(adapter)
        if (slot := self._slots.pop(adapter, None)) is not None:
            self._free.append(slot)

    def _victim(self) -> str | None:
        return next((a for a in self._slots if not self._users[a] and a not in self._pinned), None)

    def _evict(self) -> str:
        victim = self._victim()
        assert victim is not None, "has_room is asked first"
        return victim
