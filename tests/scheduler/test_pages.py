"""Page tables as the runner gets them, what a finished req leaves in the tree, and slots."""

from __future__ import annotations

import pytest

from sglang_core.types import FULL


def page_news(batch) -> dict[str, tuple[int, int]]:
    """rid -> first column sent, number of pages sent."""
    plan = batch.plan
    rows = zip(batch.reqs, plan.page_starts[FULL], plan.new_pages[FULL], strict=True)
    return {req.rid: (start, len(pages)) for req, start, pages in rows}


def test_all_pages_on_entry_then_only_new_ones(harness) -> None:
    h = harness(page_size=4, token_budget=4)
    h.add("a", list(range(10)), max_new_tokens=10)
    news = [page_news(batch)["a"] for batch in h.run()]
    assert news[0] == (0, 3), "a prompt gets its pages at once"
    assert news[1:] == [(3, 0)] * 4 + [(3, 1)] + [(4, 0)] * 3 + [(4, 1)] + [(5, 0)] * 2


def test_a_finished_req_leaves_its_whole_pages_in_the_tree(harness) -> None:
    h = harness(page_size=4)
    h.add("a", list(range(6)), max_new_tokens=6)  # 12 tokens, of which the last has no KV
    h.run()
    assert h.cache.num_pages == 2 and h.allocator.num_free == h.allocator.num_usable - 2
    req = h.add("b", [0, 1, 2, 3, 4, 5, 7, 7, 7, 7, 7, 7])
    h.step()
    assert req.num_cached_tokens == 8 and h.outputs["b"][0].num_cached_tokens == 8


def test_output_joins_the_tree_when_the_req_ends_and_not_token_by_token(harness) -> None:
    h = harness(page_size=4)
    h.add("a", list(range(8)), max_new_tokens=9)
    for _ in range(8):
        h.step()
        assert h.cache.num_pages == 2
    h.step()
    assert h.cache.num_pages == 4


def test_pages_that_two_reqs_computed_are_kept_once_and_the_table_sent_again(harness) -> None:
    h = harness(page_size=4, prefix_wait_tokens=1000, token_budget=500)
    a = h.add("a", [*range(40), 100], max_new_tokens=3)
    b = h.add("b", [*range(40), 200], max_new_tokens=3)
    first = h.plan()
    assert page_news(first) == {"a": (0, 11), "b": (0, 11)}
    h.answer(first)
    assert a.pages[FULL][:10] == b.pages[FULL][:10]
    assert h.allocator.num_usable - h.allocator.num_free == 10 + 1 + 1
    second = h.plan()
    assert page_news(second) == {"a": (11, 0), "b": (0, 11)}
    assert second.plan.new_pages[FULL][1] == b.pages[FULL]
    h.answer(second)
    assert page_news(h.plan())["b"] == (11, 0)


def test_nothing_cached_is_evicted_while_free_pages_last_and_all_of_it_if_need_be(harness) -> None:
    h = harness(num_pages=1 + 20, page_size=4)
    h.add("a", [1] * 40, max_new_tokens=1)
    h.run()
    h.add("b", [2] * 40, max_new_tokens=1)
    h.run()
    assert h.cache.num_pages == 20
    h.add("c", [3] * 79, max_new_tokens=1)
    h.run()
    assert h.tokens("c") == [7]


def test_images_share_by_content_and_not_by_placeholder(harness) -> None:
    h = harness(page_size=4)
    text, image = list(range(8)), [99] * 8
    h.add("a", [*text, *image, 1], max_new_tokens=1, req={"cache_ids": [*text, *[1001] * 8, 1]})
    h.run()
    same = h.add("b", [*text, *image, 2], max_new_tokens=1, req={"cache_ids": [*text, *[1001] * 8, 2]})
    other = h.add("c", [*text, *image, 3], max_new_tokens=1, req={"cache_ids": [*text, *[1002] * 8, 3]})
    batch = h.step()
    assert (same.num_cached_tokens, other.num_cached_tokens) == (16, 8)
    assert batch.plan.token_ids == [2, *image, 3], "the model still reads input ids"


def test_flush_empties_the_tree_and_is_refused_while_reqs_run(harness) -> None:
    h = harness()
    h.add("a", [1] * 20, max_new_tokens=3)
    h.step()
    assert not h.scheduler.flush_cache() and h.cache.num_pages == 5
    h.run()
    assert h.scheduler.flush_cache() and h.cache.num_pages == 0
    req = h.add("b", [1] * 20, max_new_tokens=1)
    h.run()
    assert req.num_cached_tokens == 0


def test_slots_are_reused_and_introduced_each_time(harness) -> None:
    h = harness(max_running=2)
    for i in range(6):
        h.add(str(i), [i, i], max_new_tokens=2, frequency_penalty=0.5 if i % 2 else 0.0)
    inits = [init for batch in h.run() for init in batch.plan.inits]
    assert [init.slot for init in inits] == [0, 1] * 3 or sorted({init.slot for init in inits}) == [0, 1]
    assert len(inits) == 6
    assert [init.history for init in inits] == [[i, i] if i % 2 else [] for i in range(6)]
    assert all(init.num_prompt_tokens == 2 and init.stop_ids == [] for init in inits)


def test_stats_add_up(harness) -> None:
    h = harness(num_pages=1 + 50, page_size=4)
    h.add("a", list(range(40)), max_new_tokens=2)
    h.step()
    stats = h.scheduler.stats()
    assert (stats["running"], stats["waiting"], stats["free_pages"]) == (1, 0, 40)
    assert stats["token_usage"] == pytest.approx(10 / 50)
    h.run()
    h.add("b", list(range(40)), max_new_tokens=2)
    h.run()
    stats = h.scheduler.stats()
    assert stats["cache_hit_rate"] == 36 / 80 and stats["cached_tokens"] == 36
    assert stats["output_tokens"] == 4 and stats["token_usage"] == 0.0
