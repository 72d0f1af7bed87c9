"""The prefix tree against a plain dictionary, and what it promises about pins, eviction and namespaces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_core.cache.radix import Peek, RadixCache, RadixNode, common_pages
from sglang_core.types import FULL, FULL_GROUP, GroupSpec

Prefix = tuple[tuple[str, ...], tuple[int, ...]]  # namespace, tokens of whole pages

NAMESPACES: list[tuple[str, ...]] = [(), ("a",)]
IDS = st.lists(st.integers(0, 2), max_size=14)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.sampled_from(NAMESPACES), IDS),
        st.tuples(st.just("match"), st.sampled_from(NAMESPACES), IDS),
        st.tuples(st.just("pin"), st.sampled_from(NAMESPACES), IDS),
        st.tuples(st.just("unpin"), st.just(()), IDS),
        st.tuples(st.just("evict"), st.just(()), st.lists(st.just(0), min_size=1, max_size=4)),
    ),
    max_size=40,
)


class Model:
    """Every cached prefix and the page that holds its last page of tokens."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.pages: dict[Prefix, int] = {}
        self.next_page = 1

    def prefixes(self, namespace: tuple[str, ...], ids: list[int]) -> Iterator[Prefix]:
        for end in range(self.page_size, len(ids) + 1, self.page_size):
            yield namespace, tuple(ids[:end])

    def match(self, namespace: tuple[str, ...], ids: list[int]) -> list[int]:
        held = []
        for prefix in self.prefixes(namespace, ids):
            if prefix not in self.pages:
                break
            held.append(self.pages[prefix])
        return held


def check(cache: RadixCache, model: Model, pins: list[tuple[RadixNode, list[int]]]) -> None:
    nodes = list(cache.nodes())
    assert sorted(page for node in nodes for page in node.pages[FULL]) == sorted(model.pages.values())
    assert cache.num_pages == len(model.pages)
    pinned = {page for _, pages in pins for page in pages}
    assert cache.num_evictable == len(model.pages) - len(pinned)
    for node in nodes:
        assert node.parent is not None and node.parent.children[node.key] is node
        assert len(node.tokens) == len(node.pages[FULL]) * cache.page_size > 0
        assert node.end == node.parent.end + len(node.tokens)
        below = sum(child.lock_ref for child in node.children.values())
        assert node.lock_ref == below + sum(held is node for held, _ in pins)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([1, 2, 3]), STEPS)
def test_the_tree_agrees_with_a_dictionary(page_size: int, steps: list[tuple[str, tuple[str, ...], list[int]]]) -> None:
    cache, model = RadixCache(page_size), Model(page_size)
    pins: list[tuple[RadixNode, list[int]]] = []
    peeks: dict[Prefix, Peek] = {}  # answers kept from earlier versions of the tree
    for action, namespace, ids in steps:
        if action == "insert":
            run = ids[: len(ids) // page_size * page_size]
            given_pages = list(range(model.next_page, model.next_page + len(run) // page_size))
            model.next_page += len(given_pages)
            held = model.match(namespace, run)
            model.pages |= dict(zip(list(model.prefixes(namespace, run))[len(held) :], given_pages[len(held) :]))
            inserted = cache.insert(namespace, run, {FULL: given_pages})
            assert inserted.duplicates[FULL] == given_pages[: len(held)]
            assert inserted.pages[FULL] == held + given_pages[len(held) :]
        elif action == "match":
            expected = model.match(namespace, ids)
            known = peeks[namespace, tuple(ids)] = cache.peek(namespace, ids, peeks.get((namespace, tuple(ids))))
            assert known.num_tokens == len(expected) * page_size
            match = cache.match(namespace, ids)
            assert (match.pages[FULL], match.num_tokens) == (expected, len(expected) * page_size)
        elif action == "pin":
            match = cache.match(namespace, ids)
            cache.lock(match.node)
            pins.append((match.node, match.pages[FULL]))
        elif action == "unpin" and pins:
            cache.unlock(pins.pop(len(ids) % len(pins))[0])
        elif action == "evict":
            pinned = {page for _, pages in pins for page in pages}
            freed = cache.evict(len(ids))[FULL]
            assert len(freed) == min(len(ids), len(model.pages) - len(pinned))
            assert not pinned & set(freed)
            model.pages = {prefix: page for prefix, page in model.pages.items() if page not in freed}
        check(cache, model, pins)


@given(st.integers(1, 4), IDS, IDS)
def test_common_pages_counts_whole_equal_pages(page_size: int, a: list[int], b: list[int]) -> None:
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    assert common_pages(a, b, page_size) == same // page_size * page_size


def insert(cache: RadixCache, ids: list[int], first_page: int, namespace: tuple[str, ...] = ()) -> None:
    cache.insert(namespace, ids, {FULL: list(range(first_page, first_page + len(ids) // cache.page_size))})


def test_the_run_used_longest_ago_leaves_first_over_all_namespaces() -> None:
    cache = RadixCache(page_size=1)
    insert(cache, [1], 10)
    insert(cache, [2], 20, ("a",))
    insert(cache, [3], 30)
    cache.match((), [1])
    assert [cache.evict(1)[FULL] for _ in range(3)] == [[20], [30], [10]]


def test_eviction_takes_the_end_of_a_run_and_a_parent_after_its_children() -> None:
    cache = RadixCache(page_size=2)
    insert(cache, [1, 1, 2, 2, 3, 3], 10)
    insert(cache, [1, 1, 9, 9], 20)  # splits behind the first page; page 20 is a duplicate
    assert cache.evict(1)[FULL] == [12]
    assert cache.match((), [1, 1, 2, 2, 3, 3]).num_tokens == 4
    assert cache.evict(10)[FULL] == [21, 11, 10]


def test_a_pin_holds_its_path_and_reset_keeps_it() -> None:
    cache = RadixCache(page_size=1)
    insert(cache, [1, 2, 3], 10)
    match = cache.match((), [1, 2])
    cache.lock(match.node)
    assert cache.reset()[FULL] == [12]
    assert cache.match((), [1, 2, 3]).pages[FULL] == [10, 11]
    cache.unlock(match.node)
    assert cache.reset()[FULL] == [10, 11]
    with pytest.raises(AssertionError):
        cache.unlock(match.node)


def test_a_holder_of_a_node_holds_the_end_of_its_path_across_splits() -> None:
    cache = RadixCache(page_size=1)
    insert(cache, [1, 2, 3, 4], 10)
    match = cache.match((), [1, 2, 3, 4])
    cache.lock(match.node)
    insert(cache, [1, 2, 9], 20)
    extended = cache.insert((), [5], {FULL: [50]}, below=match.node)
    assert extended.pages[FULL] == [50]
    assert cache.match((), [1, 2, 3, 4, 5]).pages[FULL] == [10, 11, 12, 13, 50]
    assert cache.num_evictable == 2  # the 9 and the 5
    cache.unlock(match.node)
    assert cache.num_evictable == cache.num_pages == 6


def test_every_pool_group_gets_its_pages_back() -> None:
    cache = RadixCache(page_size=2, groups=(FULL_GROUP, GroupSpec(name="window")))
    cache.insert((), [1, 1, 2, 2], {FULL: [1, 2], "window": [7, 8]})
    given = cache.insert((), [1, 1, 3, 3], {FULL: [3, 4], "window": [5, 6]})
    assert given.duplicates == {FULL: [3], "window": [5]}
    assert cache.match((), [1, 1, 3, 3]).pages == {FULL: [1, 4], "window": [7, 6]}
    assert {group: sorted(pages) for group, pages in cache.reset().items()} == {FULL: [1, 2, 4], "window": [6, 7, 8]}


def test_an_earlier_peek_helps_only_while_it_holds() -> None:
    cache, ids = RadixCache(page_size=1), [1, 2, 3, 4]
    insert(cache, ids[:3], 10)
    known = cache.peek((), ids)
    cache.insert((), [4], {FULL: [40]}, below=known.node)
    assert cache.peek((), [9, 9, 9, 4], known).num_tokens == 4, "it goes on where it ended, and does not look back"
    cache.evict(1)
    insert(cache, [1, 9], 20)  # splits above the node
    assert cache.peek((), ids, known).num_tokens == 3
    cache.match((), [1, 9])
    cache.evict(1)  # takes the end of the node
    assert cache.peek((), ids, known).num_tokens == 2
    known = cache.peek((), ids)
    cache.match((), [1, 9])
    cache.evict(1)  # and now all of it
    assert cache.peek((), ids, known).num_tokens == 1


def test_the_version_tells_when_a_match_may_give_something_else() -> None:
    cache = RadixCache(page_size=1)
    seen = [cache.version]
    insert(cache, [1, 2, 3], 10)
    seen.append(cache.version)
    insert(cache, [1, 2, 3], 20)
    cache.match((), [1, 2])
    assert cache.version == seen[-1], "nothing new"
    for _ in range(2):
        cache.evict(1)
        seen.append(cache.version)
    assert len(set(seen)) == 4


class MostUsedStays:
    """A policy from outside: what was used most recently leaves last, but node length decides first."""

    def rank(self, node: RadixNode) -> float:
        return len(node.tokens) * 1000 + node.last_used


def test_an_outside_policy_ranks_the_leaves() -> None:
    cache = RadixCache(page_size=1, policy=MostUsedStays())
    insert(cache, [1, 1, 1], 10)
    insert(cache, [2], 20)
    assert cache.evict(1)[FULL] == [20]


def test_eviction_does_not_walk_the_tree() -> None:
    """Ranks asked for while evicting grow with what is evicted, not with what is cached."""
    asked = 0

    class Counting:
        def rank(self, node: RadixNode) -> float:
            nonlocal asked
            asked += 1
            return node.last_used

    cache = RadixCache(page_size=1, policy=Counting())
    for i in range(1000):
        insert(cache, [i, i], 2 * i + 1)
    asked = 0
    for _ in range(10):
        cache.evict(2)
    assert asked <= 30
