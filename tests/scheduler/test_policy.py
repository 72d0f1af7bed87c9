"""The order in which waiting reqs start, and that no policy starves anyone."""

from __future__ import annotations

import pytest


def start_order(h, rids: str, **each) -> str:
    """Which reqs start, one at a time (max_running is 1)."""
    return "".join(batch.reqs[0].rid for batch in h.run() if batch.plan.inits)


def cached(h, ids: list[int]) -> None:
    h.add("seed", ids, max_new_tokens=1)
    h.run()


def test_fcfs_is_arrival_order_whatever_is_cached(harness) -> None:
    h = harness(max_running=1, policy="fcfs")
    cached(h, [1] * 20)
    for rid, token in (("a", 2), ("b", 1), ("c", 3)):
        h.add(rid, [token] * 20, max_new_tokens=2, req={"priority": ord(rid)})
    assert start_order(h, "abc") == "abc"


def test_lpm_starts_with_the_longest_cached_prefix(harness) -> None:
    h = harness(max_running=1, policy="lpm")
    cached(h, list(range(40)))
    h.add("a", [99] * 40, max_new_tokens=2)
    h.add("b", [*range(8), *[99] * 20], max_new_tokens=2)
    h.add("c", [*range(30), *[99] * 20], max_new_tokens=2)
    assert start_order(h, "abc") == "cba"


def test_lpm_follows_what_the_tree_holds_now(harness) -> None:
    """Look-ups are kept for as long as the tree is unchanged, not longer."""
    h = harness(max_running=1, policy="lpm")
    h.add("x", [5] * 24, max_new_tokens=3)
    h.add("a", [1] * 24, max_new_tokens=2)
    h.add("b", [5] * 24, max_new_tokens=2)
    assert start_order(h, "xab") == "xba"


def test_dfs_weight_takes_the_heavier_subtree_whole(harness) -> None:
    h = harness(policy="dfs-weight")
    cached(h, [*[1] * 8, *[2] * 8])
    cached(h, [3] * 8)
    h.add("a", [*[3] * 8, 9], max_new_tokens=1)
    h.add("b", [*[1] * 8, *[2] * 8, 9], max_new_tokens=1)
    h.add("c", [*[3] * 8, 8], max_new_tokens=1)
    h.add("d", [*[1] * 8, *[2] * 8, 8], max_new_tokens=1)
    h.add("e", [*[1] * 8, 9, 9, 9, 9], max_new_tokens=1)
    h.add("f", [4] * 8, max_new_tokens=1)
    assert "".join(req.rid for req in h.step().reqs) == "bdeacf", "what shares nothing comes last"


def test_the_highest_priority_starts_first_and_equals_by_age(harness) -> None:
    h = harness(max_running=1, policy="priority")
    for rid, priority in (("a", 0), ("b", 2), ("c", -1), ("d", 2)):
        h.add(rid, [1], max_new_tokens=2, req={"priority": priority})
    assert start_order(h, "abcd") == "bdac"


@pytest.mark.parametrize("policy", ["lpm", "dfs-weight", "priority"])
def test_a_stream_of_better_reqs_passes_the_oldest_at_most_fair_every_times(harness, policy: str) -> None:
    h = harness(max_running=1, policy=policy, fair_every=5)
    cached(h, list(range(40)))
    h.add("old", [99] * 10, max_new_tokens=1, req={"priority": -5})
    passed = 0
    while "old" not in h.outputs:
        assert passed < 20, "starved"
        for i in range(2):  # arrivals outpace the scheduler
            h.add(f"{passed}-{i}", [*range(40), passed], max_new_tokens=1, req={"priority": 5})
        h.step()
        passed += "old" not in h.outputs
    assert passed == 5


def test_the_oldest_in_turn_is_not_passed_by_smaller_ones_that_fit(harness) -> None:
    """A long prompt that waits for pages gets them, although short ones could always use what is free."""
    h = harness(num_pages=1 + 20, page_size=4, max_running=8, policy="priority", fair_every=3, output_reserve=0.0)
    h.add("long", list(range(72)), max_new_tokens=4, req={"priority": -1})
    for i in range(4):
        h.add(f"first-{i}", [i] * 4, max_new_tokens=8, req={"priority": 1})
    for i in range(40):
        h.add(f"{i}", [i] * 4, max_new_tokens=8, req={"priority": 1})
        h.step()
        if "long" in h.outputs:
            break
    assert "long" in h.outputs


def test_a_held_req_is_passed_until_its_hold_ends(harness) -> None:
    h = harness(max_running=4, policy="fcfs")
    h.add("a", [1], max_new_tokens=2, req={"holds": {"grammar", "adapter"}})
    h.add("b", [2], max_new_tokens=2)
    assert [req.rid for req in h.step().reqs] == ["b"]
    h.scheduler.release_hold("a", "grammar")
    assert [req.rid for req in h.step().reqs] == ["b"]
    assert h.scheduler.schedule() is None and h.scheduler.has_work
    h.scheduler.release_hold("a", "adapter")
    h.scheduler.release_hold("gone", "adapter")
    assert [req.rid for req in h.step().reqs] == ["a"]
