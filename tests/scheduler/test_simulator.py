"""The scheduler under random loads, and that the simulator would notice what it is there to notice."""

from __future__ import annotations

from collections import Counter

import pytest

from sglang_core.cache.radix import RadixCache
from sglang_core.scheduler.encoder_pages import EncoderPages
from sglang_core.scheduler.pages import PageLedger
from sglang_core.scheduler.quota import Quotas
from sglang_core.scheduler.simulator import Simulation
from sglang_core.scheduler.state_slots import StateSlots

GROUP_CORNERS = ("windows_moved", "tombstones", "snapshots", "encoder_outputs_shared")


def run(seeds: range) -> Counter[str]:
    totals: Counter[str] = Counter()
    for seed in seeds:
        try:
            totals += Simulation(seed).run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    return totals


def test_a_hundred_seeds_hold_and_reach_every_corner() -> None:
    totals = run(range(100))
    for corner in (
        "retractions",
        "cached_tokens",
        "device_ids",
        "mixed",
        "resent",
        "input_logprobs",
        "refused",
        *GROUP_CORNERS,
    ):
        assert totals[corner] > 0, corner
    for end in ("abort", "length", "stop", "stop string"):
        assert totals[f"ended by {end}"] > 0, end


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_seeds_hold() -> None:
    run(range(100, 2100))


def broken(seeds: int = 60) -> bool:
    for seed in range(seeds):
        try:
            Simulation(seed).run()
        except Exception:
            return True
    return False


def test_a_prefix_shared_between_namespaces_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    match = RadixCache.match
    insert = RadixCache.insert
    monkeypatch.setattr(RadixCache, "match", lambda self, ns, ids: match(self, (), ids))
    monkeypatch.setattr(
        RadixCache, "insert", lambda self, ns, ids, pages, below=None: insert(self, (), ids, pages, below)
    )
    assert broken()


def test_a_table_not_sent_again_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = PageLedger.commit

    def forgetful(self: PageLedger, req) -> None:
        sent = dict(req.sent_pages)
        commit(self, req)
        req.sent_pages = sent

    monkeypatch.setattr(PageLedger, "commit", forgetful)
    assert broken()


def test_a_leaked_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(self: PageLedger, pages) -> None:
        for group, ids in pages.items():
            self._allocators[group].free(ids[1:])

    monkeypatch.setattr(PageLedger, "_free", leaky)
    assert broken()


def test_kv_given_away_before_it_is_computed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = PageLedger.commit

    def eager(self: PageLedger, req) -> None:
        committed, req.committed_len = req.committed_len, min(req.reserved_len + self.page_size, req.num_tokens)
        commit(self, req)
        req.committed_len = max(committed, req.cached_len)

    monkeypatch.setattr(PageLedger, "commit", eager)
    assert broken()


def test_a_forgotten_pin_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RadixCache, "lock", lambda self, node: None)
    monkeypatch.setattr(RadixCache, "unlock", lambda self, node: None)
    assert broken()


def test_a_window_let_go_of_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = PageLedger._leave_behind

    def hasty(self: PageLedger, req, group: str, before: int, first: int) -> None:
        leave(self, req, group, before, min(first + 1, req.committed_len // self.page_size))

    monkeypatch.setattr(PageLedger, "_leave_behind", hasty)
    assert broken()


def test_a_window_never_let_go_of_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PageLedger, "_leave_behind", lambda self, req, group, before, first: None)
    assert broken()


def test_quotas_granted_beyond_the_pool_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quotas, "fits", lambda self, req: True)
    assert broken()


def test_a_state_written_over_while_the_tree_has_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    share = StateSlots.share

    def greedy(self: StateSlots, slot: int) -> None:
        share(self, slot)
        self.add(slot)

    monkeypatch.setattr(StateSlots, "share", greedy)
    assert broken()


def test_an_encoder_output_dropped_while_it_is_used_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    take = EncoderPages.take

    def unpinned(self: EncoderPages, req) -> None:
        take(self, req)
        if req.encoder_len:
            self._outputs[req.encoder_key].num_users -= 1

    monkeypatch.setattr(EncoderPages, "take", unpinned)
    assert broken()
