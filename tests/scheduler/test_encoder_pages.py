"""Encoder outputs in the scheduler: written once, shared by content, kept until the room is needed, and no part of a prefix."""

from __future__ import annotations

import pytest

from sglang_core.errors import RequestError
from sglang_core.types import CROSS, FULL_GROUP, GroupSpec

GROUPS = (FULL_GROUP, GroupSpec(name=CROSS, kind="cross"))


def picture(key: str, length: int = 10) -> dict:
    return {"req": {"encoder_key": key, "encoder_len": length}, "max_new_tokens": 4}


def entry(batch, rid: str):
    [slot] = [req.slot for req in batch.reqs if req.rid == rid]
    [init] = [init for init in batch.plan.inits if init.slot == slot]
    return init.encoder_pages, init.encoder_len, init.encoder_is_new


def test_one_content_is_written_once_and_shared(harness) -> None:
    h = harness(groups=GROUPS)
    for rid, key in (("a", "cat"), ("b", "cat"), ("c", "dog")):
        h.add(rid, [1, 2], **picture(key))
    h.add("text", [1, 2], max_new_tokens=4)
    batch = h.step()
    (a, a_len, a_new), (b, _, b_new), (c, _, c_new) = (entry(batch, rid) for rid in "abc")
    assert (a == b, len(a), a_len, set(a) & set(c)) == (True, 3, 10, set())
    assert (a_new, b_new, c_new) == (True, False, True)
    assert entry(batch, "text") == ([], 0, False)


def test_it_stays_for_who_comes_back_and_makes_room_for_others(harness) -> None:
    h = harness(groups=GROUPS, sizes={CROSS: 1 + 6})
    h.add("a", [1], **picture("cat"))
    h.run()
    h.add("b", [1], **picture("cat"))
    assert not entry(h.step(), "b")[2]
    h.run()
    h.add("c", [1], **picture("dog", 24))
    assert entry(h.step(), "c")[2] and h.allocators[CROSS].num_free == 0
    h.run()
    h.add("d", [1], **picture("cat"))
    assert entry(h.step(), "d")[2]
    h.run()
    assert h.scheduler.flush_cache() and h.allocators[CROSS].num_free == 6


def test_who_finds_no_room_waits(harness) -> None:
    h = harness(groups=GROUPS, sizes={CROSS: 1 + 5}, policy="fcfs")
    h.add("a", [1], **picture("cat"))
    h.add("b", [1], **picture("dog"))
    assert [req.rid for req in h.step().reqs] == ["a"]
    h.run()
    assert h.tokens("a") == h.tokens("b") == [7] * 4
    assert h.scheduler.stats()["pool_usage_cross"] == 0.0


def test_a_prefix_is_shared_under_the_same_output_only(harness) -> None:
    h = harness(groups=GROUPS)
    h.add("a", [1] * 20, **picture("cat"))
    h.run()
    same, other = h.add("b", [1] * 20, **picture("cat")), h.add("c", [1] * 20, **picture("dog"))
    h.run()
    assert (same.num_cached_tokens, other.num_cached_tokens) == (16, 0)


@pytest.mark.parametrize(("groups", "room"), [(GROUPS, 24), ((FULL_GROUP,), 0)])
def test_what_could_never_fit_is_refused(harness, groups, room: int) -> None:
    h = harness(groups=groups, sizes={CROSS: 1 + 6})
    with pytest.raises(RequestError, match=rf"output of 25 tokens, and the pool for it holds {room}") as caught:
        h.add("a", [1], **picture("cat", 25))
    assert caught.value.param == "encoder_len"
