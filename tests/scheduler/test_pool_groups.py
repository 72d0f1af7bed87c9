"""Pool groups in the scheduler: windows that move on, quotas that bound them, and states that can be shared."""

from __future__ import annotations

import pytest

from sglang_core.errors import ConfigError, RequestError
from sglang_core.types import FULL, FULL_GROUP, STATE, GroupSpec

WINDOW = GroupSpec(name="w", kind="windowed", window=10)
STATES = GroupSpec(name=STATE, kind="state")
HYBRID = (FULL_GROUP, WINDOW)
RECURRENT = (FULL_GROUP, STATES)


def in_use(harness, group: str) -> int:
    allocator = harness.allocators[group]
    return allocator.num_usable - allocator.num_free


def test_decoding_gives_back_what_the_window_has_passed(harness) -> None:
    h = harness(groups=HYBRID, cached=False)
    req = h.add("a", list(range(8)), max_new_tokens=100)
    used = []
    while h.scheduler.has_work:
        h.step()
        used.append(in_use(h, "w"))
        assert req.pages == {} or sum(page != 0 for page in req.pages["w"]) == used[-1]
    assert max(used) == 4, "ten tokens lie in four pages of 4 at most"
    assert in_use(h, FULL) == in_use(h, "w") == 0


def test_a_prompt_gets_window_pages_chunk_by_chunk(harness) -> None:
    h = harness(groups=HYBRID, cached=False, token_budget=12)
    h.add("a", list(range(60)), max_new_tokens=1)
    first, second = h.step(), h.step()
    assert [len(pages) for pages in first.plan.new_pages[FULL] + first.plan.new_pages["w"]] == [15, 3]
    assert second.plan.page_starts == {FULL: [15], "w": [3]}
    assert in_use(h, "w") <= 6 < in_use(h, FULL) == 15


def test_the_tree_keeps_what_a_prompts_window_left_and_gives_it_up_first(harness) -> None:
    h = harness(groups=HYBRID, sizes={"w": 1 + 12}, token_budget=12)
    h.add("a", list(range(41)), max_new_tokens=1)
    h.run()
    assert in_use(h, FULL) == in_use(h, "w") == 10
    half = h.add("b", list(range(20)) + [99] * 4, max_new_tokens=1)
    h.run()
    assert half.num_cached_tokens == 20, "pages from the middle of the prompt are still there"
    h.add("c", [7] * 30, max_new_tokens=1)  # takes window pages, and has enough of the full ones
    h.run()
    again = h.add("d", list(range(41)), max_new_tokens=1)
    h.run()
    assert again.num_cached_tokens < 40 and h.cache.match((), list(range(41))).num_tokens == 40


def test_a_quota_keeps_a_req_out_and_shrinks_when_it_decodes(harness) -> None:
    h = harness(groups=HYBRID, sizes={"w": 1 + 15}, token_budget=24, output_reserve=0.0)
    first = h.add("a", [1] * 40, max_new_tokens=50)
    second = h.add("b", [2] * 40, max_new_tokens=50)
    h.step()
    assert first.quota["w"] == (10 + 3 + 24 + 2) // 4 + 1 and not second.quota
    h.step()
    assert first.quota["w"] == (10 + 3 + 1 + 2) // 4 + 1
    h.step()
    assert second.slot >= 0
    h.run()
    assert len(h.tokens("a")) == len(h.tokens("b")) == 50 and h.scheduler.stats()["retractions"] == 0


def test_chunks_are_cut_to_what_a_small_pool_has_room_for(harness) -> None:
    h = harness(groups=HYBRID, sizes={"w": 1 + 6}, token_budget=64)
    h.add("a", list(range(60)), max_new_tokens=3)
    batches = h.run()
    assert max(sum(batch.plan.extend_lens) for batch in batches) == 5 * 4 + 1 - 10 - 3
    assert h.tokens("a") == [7] * 3


def test_a_pool_without_room_for_one_window_is_refused(harness) -> None:
    with pytest.raises(ConfigError, match=r"pool 'w' has 3 pages and one request needs 5: a window of 10 tokens"):
        harness(groups=HYBRID, sizes={"w": 1 + 3})


def test_window_pages_need_no_full_group(harness) -> None:
    h = harness(groups=(WINDOW,), num_pages=1 + 14, token_budget=16, output_reserve=0.0)
    for rid in "ab":
        h.add(rid, [ord(rid)] * 100, max_new_tokens=100)
    h.run()
    assert len(h.tokens("a")) == len(h.tokens("b")) == 100
    assert h.scheduler.flush_cache() and in_use(h, "w") == 0 and not list(h.cache.nodes())


def test_a_prompts_state_is_kept_after_its_last_whole_page(harness) -> None:
    h = harness(groups=RECURRENT, sizes={STATE: 20})
    h.add("a", list(range(11)), max_new_tokens=2)
    batches = h.run()
    assert [batch.plan.extend_lens for batch in batches] == [[8], [3], [1]]
    assert [batch.plan.state_reads for batch in batches[:2]] == [[0], batches[0].plan.state_writes]
    req = h.add("b", list(range(11)), max_new_tokens=1)
    batch = h.step()
    assert req.num_cached_tokens == 8 and batch.plan.state_reads == batches[0].plan.state_writes


def test_a_conversation_goes_on_from_the_end_of_the_answer(harness) -> None:
    h = harness(groups=RECURRENT, sizes={STATE: 20})
    h.add("a", list(range(6)), max_new_tokens=12)
    h.run()
    req = h.add("b", [*range(6), *[7] * 12, 1, 2, 3], max_new_tokens=1)
    h.run()
    assert req.num_cached_tokens == 16, "17 tokens were computed, four whole pages"


def test_states_of_ended_reqs_make_room_for_running_ones(harness) -> None:
    h = harness(groups=RECURRENT, sizes={STATE: 1 + 4})
    for i in range(5):
        h.add(str(i), [i] * 9, max_new_tokens=5)
        h.run()
        assert len(h.tokens(str(i))) == 5
    assert in_use(h, STATE) == h.cache.loose[STATE].num_pages <= 4


def test_logprobs_of_a_prompt_too_long_for_a_step_are_refused_where_states_are(harness) -> None:
    h = harness(groups=RECURRENT, sizes={STATE: 20}, token_budget=16)
    with pytest.raises(RequestError, match=r"prompt of 20 tokens.*a step takes 16.*--chunked-prefill-size") as caught:
        h.add("a", list(range(20)), logprob_start_len=0)
    assert caught.value.status == 400 and caught.value.param == "logprob_start_len"
    h.add("b", list(range(16)), logprob_start_len=0, max_new_tokens=1)
    assert [batch.plan.extend_lens for batch in h.run()] == [[16]]


def test_usage_is_told_for_each_pool(harness) -> None:
    h = harness(groups=HYBRID, sizes={FULL: 1 + 50, "w": 1 + 20})
    h.add("a", list(range(40)), max_new_tokens=5)
    h.step()
    stats = h.scheduler.stats()
    assert (stats["pool_usage_full"], stats["pool_usage_w"]) == pytest.approx((10 / 50, 3 / 20))
    assert stats["token_usage"] == stats["pool_usage_full"]
