"""Slots for adapters: who gets one, who waits for one, and that nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_core.errors import RequestError
from sglang_core.scheduler.adapter_slots import NO_SLOT, AdapterSlots
from sglang_core.scheduler.simulator import Simulation
from sglang_core.scheduler.waiting import WaitingQueue
from tests.scheduler.conftest import Harness


def adapters_of(harness: Harness) -> list[str]:
    batch = harness.scheduler.schedule()
    assert batch is not None
    harness.answer(batch)
    return [req.adapter for req in batch.reqs]


def test_the_least_recently_used_idle_adapter_leaves() -> None:
    slots = AdapterSlots(2)
    a, b = slots.acquire("a@1"), slots.acquire("b@1")
    assert {a, b} == {0, 1} and slots.acquire("") == NO_SLOT
    assert not slots.has_room("c@1") and slots.has_room("a@1") and slots.has_room("")
    slots.release("a@1")
    slots.release("b@1")
    assert slots.acquire("a@1") == a  # now b is the older one
    slots.release("a@1")
    assert slots.acquire("c@1") == b
    assert [(w.slot, w.adapter) for w in slots.take_writes()] == [(a, "a@1"), (b, "b@1"), (b, "c@1")]
    assert slots.take_writes() == [] and slots.num_writes == 3


def test_pinned_adapters_stay_and_leave_a_slot_to_the_others() -> None:
    slots = AdapterSlots(2)
    slots.pin("a@1")
    a = slots.acquire("a@1")
    slots.release("a@1")
    for other in ("b@1", "c@1", "d@1"):
        assert slots.acquire(other) != a
        slots.release(other)
    with pytest.raises(RequestError, match="--max-loras-per-batch"):
        slots.pin("b@1")
    slots.forget("a@1")
    slots.pin("b@1")


@given(st.lists(st.tuples(st.sampled_from(["", "a", "b", "c", "d"]), st.booleans()), max_size=60), st.integers(1, 3))
def test_a_slot_in_use_is_never_written(steps: list[tuple[str, bool]], num_slots: int) -> None:
    slots, held, running = AdapterSlots(num_slots), {}, []
    for adapter, starts in steps:
        if starts and slots.has_room(adapter):
            slot = slots.acquire(adapter)
            for write in slots.take_writes():
                assert write.slot not in {s for _, s in running}, "overwritten while in use"
                held[write.slot] = write.adapter
            assert held.get(slot, "") == adapter and slot == slots.slot(adapter)
            running.append((adapter, slot))
        elif running:
            slots.release(running.pop(0)[0])
    assert len({slot for adapter, slot in running if adapter}) <= num_slots


def test_a_req_waits_for_a_slot_and_others_pass() -> None:
    harness = Harness(num_adapter_slots=1, fair_every=16)
    for rid, adapter in (("1", "a@1"), ("2", "b@1"), ("3", "a@1"), ("4", "")):
        harness.add(rid, [1, 2, 3, ord(rid)], req={"adapter": adapter, "namespace": ("", adapter)}, max_new_tokens=3)
    assert adapters_of(harness) == ["a@1", "a@1", ""]
    seen: list[str] = []
    while harness.scheduler.has_work:
        seen += adapters_of(harness)
    assert seen.count("b@1") == 3 and seen.index("b@1") > max(i for i, a in enumerate(seen) if a == "a@1")


def starts() -> bool:
    """Whether a stream of requests for one adapter lets another into the only slot."""
    harness = Harness(num_adapter_slots=1, fair_every=4, max_running=2)
    harness.add("first", [1, 2], req={"adapter": "a@1"}, max_new_tokens=4)
    adapters_of(harness)
    harness.add("other", [3, 4], req={"adapter": "b@1"}, max_new_tokens=2)
    for turn in range(60):
        harness.add(f"a{turn}", [5, turn], req={"adapter": "a@1"}, max_new_tokens=4)
        adapters_of(harness)
        if harness.outputs.get("other"):
            return True
    return False


def test_no_adapter_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    assert starts()
    monkeypatch.setattr(WaitingQueue, "is_due", lambda self, req: False)
    assert not starts()


def test_a_slot_given_away_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterSlots, "_victim", lambda self: next(iter(self._slots), None))
    assert _broken()


def test_cached_prefixes_of_another_adapter_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Simulation._draw_client

    def shared(self: Simulation, rid: str):
        client = draw(self, rid)
        client.req.namespace = client.req.namespace[:-1]
        return client

    monkeypatch.setattr(Simulation, "_draw_client", shared)
    assert _broken()


def _broken(seeds: int = 60) -> bool:
    for seed in range(seeds):
        try:
            Simulation(seed).run()
        except AssertionError:
            return True
    return False
