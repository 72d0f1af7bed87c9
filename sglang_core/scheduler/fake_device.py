"""A device for the simulator: its KV slots remember which tokens they were written for, so that a page in the wrong hands shows.

The "KV" of position i is a hash chained over the req's tokens up to i, and the next token is a function of the last link: it
depends on the whole history and on nothing else. A freed page is poisoned in stream order. Each step checks every position it
reads, so corruption is found where it happens and not only when an output differs. Of a windowed group it reads the window, and
no more; a state is the last link of the tokens that went into it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sglang_core.cache.page_allocator import SCRATCH_PAGE, PageAllocator
from sglang_core.types import Batch, GroupSpec, PoolGroup, Req, StepPlan, StepResult, TokenLogprobs

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
        self,
        groups: Sequence[GroupSpec],
        num_pages: Mapping[PoolGroup, int],
        page_size: int,
        max_running: int,
        vocab_size: int,
        tokens_per_step: int = 1,
    ) -> None:
        self.page_size = page_size
        self.vocab_size = vocab_size
        self.tokens_per_step = tokens_per_step
        self._windows = {group.name: group.window for group in groups if group.kind in ("full", "windowed")}
        self._slots_of = {group.name: 1 if group.kind == "state" else page_size for group in groups}
        self._cross = next((group.name for group in groups if group.kind == "cross"), None)
        self._encoders: list[tuple[list[int], int]] = [([], 0)] * max_running  # pages, tokens
        self._kv = {name: [[POISON] * self._slots_of[name] for _ in range(n)] for name, n in num_pages.items()}
        self._state = next((group.name for group in groups if group.kind == "state"), None)
        self._tables: list[dict[PoolGroup, list[int]]] = [{} for _ in range(max_running)]
        self._next_token_ids = [POISON] * max_running
        self._adapters: dict[int, str] = {}  # by adapter slot
        self._adapter_slots = [-1] * max_running
        self._stream: deque[tuple[Batch, list[History]] | tuple[PoolGroup, list[int]]] = deque()

    def poison(self, group: PoolGroup, pages: Sequence[int]) -> None:
        """These pages hold nothing any more, once the steps submitted so far have run."""
        self._stream.append((group, list(pages)))

    def submit(self, batch: Batch, histories: list[History]) -> None:
        """Queue a step. `histories[r]` is the truth about row r to check by; the step itself does not use it."""
        self._stream.append((batch, histories))

    def run_next(self) -> StepResult:
        """Run the oldest step that was submitted."""
        while isinstance((op := self._stream.popleft())[0], str):
            group, pages = op
            for page in pages:
                self._kv[group][page] = [POISON] * self._slots_of[group]
        batch, histories = op
        return self._run(batch, histories)

    def _run(self, batch: Batch, histories: list[History]) -> StepResult:
        plan = batch.plan
        self._update_tables(plan)
        ids = self._gather_ids(plan)
        outputs: list[list[int]] = []
        logprobs: list[list[TokenLogprobs]] = []
        written: set[tuple[PoolGroup, int, int]] = set()
        if self._state is not None:
            self._check_states(plan, [history.links for history in histories])
        if self._cross is not None:
            self._encode(self._cross, batch)
        for row, slot in enumerate(plan.slots):
            start, extend = plan.prefix_lens[row], ids[row]
            adapter = self._adapters.get(self._adapter_slots[slot], "")
            assert adapter == batch.reqs[row].adapter, f"row {row} of step {plan.step} runs with another's adapter"
            truth, salt = histories[row].links, histories[row].salt
            for group, window in self._windows.items():
                first = 0 if window is None else max(0, start - window + 1)
                assert self._read(group, slot, first, start) == truth[first:start], (
                    f"row {row} of step {plan.step} reads KV of {group} that is not its own"
                )
            links = self._write(slot, start, extend, truth[start - 1] if start else salt, written)
            assert links == truth[start : start + len(extend)], f"row {row} of step {plan.step} was given wrong tokens"
            if self._state is not None:
                self._kv[self._state][plan.state_writes[row]] = links[-1:]
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
        for write in plan.adapter_writes:
            self._adapters[write.slot] = write.adapter
        for init in plan.inits:
            self._tables[init.slot] = {group: [] for group in self._windows}
            self._adapter_slots[init.slot] = init.adapter
            self._encoders[init.slot] = init.encoder_pages, init.encoder_len
        for group, window in self._windows.items():
            for slot, column, pages in zip(plan.slots, plan.page_starts[group], plan.new_pages[group], strict=True):
                table = self._tables[slot][group]
                assert column <= len(table), "a gap in the page table"
                assert window is not None or SCRATCH_PAGE not in pages
                table[column:] = pages

    def _check_states(self, plan: StepPlan, truths: Sequence[Sequence[int]]) -> None:
        assert self._state is not None and len(plan.state_reads) == len(plan.state_writes) == len(plan.slots)
        assert len(set(plan.state_writes)) == len(plan.slots), "two rows of a step write the same state"
        assert not set(plan.state_writes) & {0, *plan.state_reads}, "a step writes a state that it reads"
        for row, (read, start) in enumerate(zip(plan.state_reads, plan.prefix_lens, strict=True)):
            held = [] if read == 0 else self._kv[self._state][read]
            expected = [truths[row][start - 1]] if start else []
            assert held == expected, f"row {row} of step {plan.step} reads a state that is not its own"

    def _encode(self, group: PoolGroup, batch: Batch) -> None:
        """Write what encoders made for reqs that enter, then check that every row finds its own: a chain of its key."""
        rows = dict(zip(batch.plan.slots, batch.reqs, strict=True))
        for init in batch.plan.inits:
            if init.encoder_is_new:
                made = encoder_links(rows[init.slot])
                for at, page in enumerate(init.encoder_pages):
                    part = made[at * self.page_size : (at + 1) * self.page_size]
                    self._kv[group][page][: len(part)] = part
        for slot, req in rows.items():
            pages, length = self._encoders[slot]
            held = [kv for page in pages for kv in self._kv[group][page]][:length]
            assert held == encoder_links(req), f"{req.rid} attends to another's encoder output"

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

    def _read(self, group: PoolGroup, slot: int, first: int, stop: int) -> list[int]:
        table, size = self._tables[slot][group], self.page_size
        assert stop <= len(table) * size, "the page table is too short for the prefix"
        start = first // size
        pages = table[start : -(-stop // size)]
        return [kv for page in pages for kv in self._kv[group][page]][first - start * size : stop - start * size]

    def _write(
        self, slot: int, start: int, ids: list[int], last: int, written: set[tuple[PoolGroup, int, int]]
    ) -> list[int]:
        links = []
        for position, token in enumerate(ids, start):
            last = link(last, token)
            links.append(last)
            for group, table in self._tables[slot].items():
                page, offset = table[position // self.page_size], position % self.page_size
                assert page != SCRATCH_PAGE, f"a token is written where {group} has no page"
                assert (group, page, offset) not in written, "two rows of a step write the same slot"
                written.add((group, page, offset))
                self._kv[group][page][offset] = last
        return links

    def _sample(self, slot: int, position: int, last: int, written: set[tuple[PoolGroup, int, int]]) -> list[int]:
        """One token, or up to `tokens_per_step` as if drafts had been accepted: then all but the last have their KV."""
        out = [next_token(last, self.vocab_size)]
        columns = min(len(table) for table in self._tables[slot].values())
        room = columns * self.page_size - position  # a prompt's last chunk may have none for drafts
        for _ in range(min(room, last % self.tokens_per_step)):
            last = self._write(slot, position, out[-1:], last, written)[0]
            position += 1
            out.append(next_token(last, self.vocab_size))
        self._next_token_ids[slot] = out[-1]
        return out


def encoder_links(req: Req) -> list[int]:
    """What an encoder makes of the content that `encoder_key` stands for."""
    return chain(sum(req.encoder_key.encode()), range(req.encoder_len))


def input_logprobs(first: int, start: int, extend: list[int], links: list[int]) -> list[TokenLogprobs]:
    """Of positions `[first, start + len(extend))`, each made from the hidden state before it, in this very extend."""
    return [
        TokenLogprobs(extend[p - start], None if p == 0 else float(links[p - 1 - start] % 1000))
        for p in range(first, start + len(extend))
    ]


class WatchedAllocator(PageAllocator):
    """Tells the device about every page that is freed."""

    def __init__(self, num_pages: int, device: FakeDevice, group: PoolGroup) -> None:
        super().__init__(num_pages)
        self._device, self._group = device, group

    def free(self, pages: Sequence[int]) -> None:
        super().free(pages)
        self._device.poison(self._group, pages)
