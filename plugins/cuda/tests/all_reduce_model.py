"""csrc/all_reduce.cu as steps, under a scheduler that may run any block of any rank next.

A block is one thread here. What it writes to a slot is seen by others at some later time, in any order, unless a release has come after it: as
the memory of a GPU has it. Numbers say which call, rank and element they are of, and a read that meets another one raises.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

STEPS = 200_000
Place = tuple[str, int, int]  # "slot" or "result", which of the two, element
Number = tuple[int, ...]  # call, element, then the ranks that were added up
Block = Generator[None, None, None]
Call = tuple[int, bool]  # its grid, and whether it is two shots


class Broken(AssertionError):
    """A rank read what was not there yet, or no longer; or nothing goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """The kernel's, and what a mistake in it would be."""

    num_slots: int = 2
    releases: bool = True
    waits: tuple[bool, bool] = (True, True)  # at each of the two meetings
    last_block_counts: bool = True  # else the first to end does


@dataclass
class Region:
    memory: dict[Place, Number] = field(default_factory=dict)
    said: dict[tuple[int, int, int], int] = field(default_factory=dict)  # stage, block, rank
    calls: int = 0
    finished: int = 0


class Machine:
    """Ranks with a region each, which all make the same calls."""

    def __init__(self, protocol: Protocol, size: int, calls: Sequence[Call], elements: int, seed: int) -> None:
        self.protocol, self.size, self.calls, self.elements = protocol, size, calls, elements
        self.random = random.Random(seed)
        self.regions = [Region() for _ in range(size)]
        self.pending: dict[tuple[int, int], list[tuple[Place, Number]]] = {}  # by rank and block: written, not seen yet
        self.results: list[list[dict[int, Number]]] = [[{} for _ in calls] for _ in range(size)]

    def run(self) -> None:
        """Every call of every rank. Raises Broken."""
        running = {rank: self.launch(rank, 0) for rank in range(self.size)}
        launched = dict.fromkeys(running, 0)
        for _ in range(STEPS):
            self.show_some()
            rank = self.random.choice(list(running))
            number = self.random.choice(list(running[rank]))
            try:
                next(running[rank][number])
            except StopIteration:
                del running[rank][number]
            if not running[
                rank
            ]:  # a stream: the next kernel starts when all blocks have ended, and what they wrote is seen
                for block in range(self.calls[launched[rank]][0]):
                    self.show_all(rank, block)
                launched[rank] += 1
                if launched[rank] == len(self.calls):
                    del running[rank]
                else:
                    running[rank] = self.launch(rank, launched[rank])
            if not running:
                return
        raise Broken("nothing goes on")

    def launch(self, rank: int, index: int) -> dict[int, Block]:
        grid, two_shots = self.calls[index]
        kernel = self.two_shot if two_shots else self.one_shot
        return {block: kernel(rank, block, grid, self.results[rank][index], index) for block in range(grid)}

    def one_shot(self, rank: int, block: int, grid: int, out: dict[int, Number], index: int) -> Block:
        call = self.regions[rank].calls + 1
        yield
        which, mine = call % self.protocol.num_slots, range(block, self.elements, grid)
        for i in mine:
            self.write(rank, block, ("slot", which, i), (index, i, rank))
            yield
        yield from self.meet(0, rank, block, call)
        for i in mine:
            out[i] = yield from self.sum(rank, block, which, i, index)
        yield from self.end(rank, grid)

    def two_shot(self, rank: int, block: int, grid: int, out: dict[int, Number], index: int) -> Block:
        call = self.regions[rank].calls + 1
        yield
        which, part = call % self.protocol.num_slots, -(-self.elements // self.size)
        stripes = [
            [i for i in range(p * part + block, (p + 1) * part, grid) if i < self.elements] for p in range(self.size)
        ]
        for i in itertools.chain(*stripes):
            self.write(rank, block, ("slot", which, i), (index, i, rank))
            yield
        yield from self.meet(0, rank, block, call)
        for i in stripes[rank]:
            total = yield from self.sum(rank, block, which, i, index)
            self.write(rank, block, ("result", which, i), total)
        yield from self.meet(1, rank, block, call)
        for p, stripe in enumerate(stripes):
            for i in stripe:
                out[i] = self.read(rank, block, p, ("result", which, i), (index, i, *range(self.size)))
                yield
        yield from self.end(rank, grid)

    def meet(self, stage: int, rank: int, block: int, call: int) -> Block:
        if self.protocol.releases:
            self.show_all(rank, block)
        for peer in self.random.sample(range(self.size), self.size):
            self.regions[peer].said[stage, block, rank] = call
            yield
        while self.protocol.waits[stage] and any(
            self.regions[rank].said.get((stage, block, peer), 0) < call for peer in range(self.size)
        ):
            yield

    def end(self, rank: int, grid: int) -> Block:
        own = self.regions[rank]
        own.finished += 1
        if own.finished == (grid if self.protocol.last_block_counts else 1):
            own.calls += 1
        if own.finished == grid:
            own.finished = 0
        yield

    def sum(self, rank: int, block: int, which: int, i: int, index: int) -> Generator[None, None, Number]:
        ranks: tuple[int, ...] = ()
        for peer in range(self.size):
            ranks += self.read(rank, block, peer, ("slot", which, i), (index, i, peer))[2:]
            yield
        return (index, i, *ranks)

    def write(self, rank: int, block: int, place: Place, number: Number) -> None:
        self.pending.setdefault((rank, block), []).append((place, number))

    def read(self, rank: int, block: int, peer: int, place: Place, wanted: Number) -> Number:
        own = [number for at, number in self.pending.get((rank, block), []) if peer == rank and at == place]
        found = own[-1] if own else self.regions[peer].memory.get(place)
        if found != wanted:
            raise Broken(f"rank {rank} reads {found} of rank {peer} in place of {wanted}")
        return found

    def show_all(self, rank: int, block: int) -> None:
        for place, number in self.pending.pop((rank, block), []):
            self.regions[rank].memory[place] = number

    def show_some(self) -> None:
        """Now and then a write is seen on its own, not the oldest first."""
        if self.pending and self.random.random() < 0.1:
            rank, block = self.random.choice(list(self.pending))
            if written := self.pending[rank, block]:
                place, number = written.pop(self.random.randrange(len(written)))
                self.regions[rank].memory[place] = number
