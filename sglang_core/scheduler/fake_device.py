"""A device for the simulator: its KV slots remember which tokens they were written for, so that a page in the wrong hands shows.

The "KV" of position i is a hash chained over the req's tokens up to i, and the next token is a function of the last link: it
depends on the whole history and on nothing else. A freed page is poisoned in stream order. Each step checks every position it
reads, so corruption is found where it happens and not only when an output differs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sglang_core.cache.page_allocator import SCRATCH_PAGE, PageAllocator
from sglang_core.types import FULL, Batch, StepPlan, StepResult, TokenLogprobs

POISON = -1
MODULUS = (1 << 61) - 1
MULTIPLIER = 6_364_136_223_846_793_005


def link(previous: int, token: int) -> int:
    """The KV of a token after a prefix whose last KV is `previous`."""
    return ((previous + token + 1) * MULTIPLIER + 1_442_695_040_888_963_407) % MODULUS


def chain(salt: int, token_ids: Iterable[int]) -> list[int]:
    """The KV of each of a req's tokens."""
    links, last = [], salt
    for token in token_ids:
        last = link(last, token)
        links.append(last)
    return links


@dataclass(frozen=True, slots=True)
class History:
    """What is true of a req whatever is scheduled: its tokens, as if it never stopped, and their KV."""

    salt: int  # of its namespace: equal tokens of two namespaces have different KV
    token_ids: list[int]
    links: list[int]

    @classmethod
    def of(cls, salt: int, prompt: list[int], num_outputs: int, vocab_size: int) -> History:
        """The prompt, and tokens generated one by one with nothing cached."""
        tokens, links = list(prompt), chain(salt, prompt)
        for _ in range(num_outputs):
            tokens.append(next_token(links[-1], vocab_size))
            links.append(link(links[-1], tokens[-1]))
        return cls(salt, tokens, links)


def next_token(last_link: int, vocab_size: int) -> int:
    return (last_link >> 20) % vocab_size


class FakeDevice:
    """Runs submitted steps in order, one a call. It knows of a req only its slot, as a runner does."""

    def __init__(
        self, num_pages: int, page_size: int, max_running: int, vocab_size: int, tokens_per_step: int = 1
    ) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.tokens_per_step = tokens_per_step
        self._kv = [[POISON] * page_size for _ in range(num_pages)]
        self._tables: list[list[int]] = [[] for _ in range(max_running)]
        self._next_token_ids = [POISON] * max_running
        self._stream: deque[tuple[Batch, list[History]] | list[int]] = deque()

    def poison(self, pages: Sequence[int]) -> None:
        """These pages hold nothing any more, once the steps submitted so far have run."""
        self._stream.append(list(pages))

    def submit(self, batch: Batch, histories: list[History]) -> None:
        """Queue a step. `histories[r]` is the truth about row r to check by; the step itself does not use it."""
        self._stream.append((batch, histories))

    def run_next(self) -> StepResult:
        """Run the oldest step that was submitted."""
        while isinstance(op := self._stream.popleft(), list):
            for page in op:
                self._kv[page] = [POISON] * self.page_size
        return self._run(*op)

    def _run(self, batch: Batch, histories: list[History]) -> StepResult:
        plan = batch.plan
        self._update_tables(plan)
        ids = self._gather_ids(plan)
        outputs: list[list[int]] = []
        logprobs: list[list[TokenLogprobs]] = []
        written: set[tuple[int, int]] = set()
        for row, slot in enumerate(plan.slots):
            start, extend = plan.prefix_lens[row], ids[row]
            truth, salt = histories[row].links, histories[row].salt
            assert self._read(slot, start) == truth[:start], (
                f"row {row} of step {plan.step} reads KV that is not its own"
            )
            links = self._write(slot, start, extend, truth[start - 1] if start else salt, written)
            assert links == truth[start : start + len(extend)], f"row {row} of step {plan.step} was given wrong tokens"
            outputs.append(self._sample(slot, start + len(extend), links[-1], written) if plan.sample[row] else [])
            first = plan.logprob_starts[row] if plan.logprob_starts else -1
            logprobs.append(input_logprobs(first, start, extend, links) if first >= 0 else [])
        return StepResult(
            step=plan.step,
            token_ids=outputs,
            num_accepted=[len(out) for out in outputs],
            input_logprobs=logprobs if plan.logprob_starts else None,
        )

    def _update_tables(self, plan: StepPlan) -> None:
        for init in plan.inits:
            self._tables[init.slot] = []
        for slot, column, pages in zip(plan.slots, plan.page_starts, plan.new_pages[FULL], strict=True):
            assert column <= len(self._tables[slot]), "a gap in the page table"
            assert SCRATCH_PAGE not in pages
            self._tables[slot][column:] = pages

    def _gather_ids(self, plan: StepPlan) -> list[list[int]]:
        """Ids per row, those that only the device knows filled in."""
        rows, at = [], 0
        for slot, extend in zip(plan.slots, plan.extend_lens, strict=True):
            ids = plan.token_ids[at : at + extend]
            at += extend
            assert -1 not in ids[:-1] and (ids != [-1] or self._next_token_ids[slot] != POISON)
            rows.append([self._next_token_ids[slot] if token == -1 else token for token in ids])
        assert at == len(plan.token_ids)
        return rows

    def _read(self, slot: int, stop: int) -> list[int]:
        num_pages = -(-stop // self.page_size)
        assert num_pages <= len(self._tables[slot]), "the page table is too short for the prefix"
        return [kv for page in self._tables[slot][:num_pages] for kv in self._kv[page]][:stop]

    def _write(self, slot: int, start: int, ids: list[int], last: int, written: set[tuple[int, int]]) -> list[int]:
        links = []
        for position, token in enumerate(ids, start):
            page, offset = self._tables[slot][position // self.page_size], position % self.page_size
            assert (page, offset) not in written, "two rows of a step write the same slot"
            written.add((page, offset))
            last = self._kv[page][offset] = link(last, token)
            links.append(last)
        return links

    def _sample(self, slot: int, position: int, last: int, written: set[tuple[int, int]]) -> list[int]:
        """One token, or up to `tokens_per_step` as if drafts had been accepted: then all but the last have their KV."""
        out = [next_token(last, self.vocab_size)]
        room = len(self._tables[slot]) * self.page_size - position  # a prompt's last chunk may have none for drafts
        for _ in range(min(room, last % self.tokens_per_step)):
            last = self._write(slot, position, out[-1:], last, written)[0]
            position += 1
            out.append(next_token(last, self.vocab_size))
        self._next_token_ids[slot] = out[-1]
        return out


def input_logprobs(first: int, start: int, extend: list[int], links: list[int]) -> list[TokenLogprobs]:
    """Of positions `[first, start + len(extend))`, each made from the hidden state before it, in this very extend."""
    return [
        TokenLogprobs(extend[p - start], None if p == 0 else float(links[p - 1 - start] % 1000))
        for p in range(first, start + len(extend))
    ]


class WatchedAllocator(PageAllocator):
    """Tells the device about every page that is freed."""

    def __init__(self, num_pages: int, device: FakeDevice) -> None:
        super().__init__(num_pages)
        self._device = device

    def free(self, pages: Sequence[int]) -> None:
        super().free(pages)
        self._device.poison(pages)
