"""The prefix tree of models with windows and states against a plain dictionary: a match ends where all that is read is held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_core.cache.loose_pages import covered
from sglang_core.cache.radix import Pages, RadixCache, RadixNode
from sglang_core.types import FULL, FULL_GROUP, STATE, GroupSpec

Prefix = tuple[int, ...]

NEAR, FAR = (GroupSpec(name=f"window-{w}", kind="windowed", window=w) for w in (2, 5))
STATES = GroupSpec(name=STATE, kind="state")
MODELS = [
    (FULL_GROUP, NEAR),
    (FULL_GROUP, NEAR, FAR),
    (FAR,),
    (FULL_GROUP, STATES),
    (FAR, FULL_GROUP, STATES),
    (NEAR, STATES),
]
IDS = st.lists(st.integers(0, 1), max_size=12)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), IDS, st.integers(0, 6)),
        st.tuples(st.just("match"), IDS, st.just(0)),
        st.tuples(st.just("pin"), IDS, st.just(0)),
        st.tuples(st.sampled_from(["unpin", "move on"]), IDS, st.integers(0, 3)),
        st.tuples(st.just("evict"), IDS, st.integers(0, 3)),
    ),
    max_size=40,
)


@dataclass
class Pin:
    """A holder of the end of a path, and what of its loose pages it still pins."""

    node: RadixNode
    prefix: Prefix
    tail: Pages


class Model:
    """Every cached prefix, and by group the page of its last page of tokens, or its state, if the tree has it."""

    def __init__(self, page_size: int, groups: tuple[GroupSpec, ...]) -> None:
        self.page_size, self.groups = page_size, groups
        self.pages: dict[Prefix, dict[str, int]] = {}
        self.next_page = 1
        self.has_full = FULL_GROUP in groups

    def prefixes(self, ids: list[int] | Prefix) -> Iterator[Prefix]:
        for end in range(self.page_size, len(ids) + 1, self.page_size):
            yield tuple(ids[:end])

    def new_page(self) -> int:
        self.next_page += 1
        return self.next_page - 1

    def usable(self, prefix: Prefix) -> bool:
        """Whether a req may go on after `prefix`: token by token, what the next one reads."""
        held = list(self.prefixes(prefix))
        for group in self.groups:
            for position in range(len(prefix)):
                page = self.pages[held[position // self.page_size]].get(group.name)
                is_read = group.window is None or position > len(prefix) - group.window
                if group.kind != "state" and is_read and page is None:
                    return False
            if group.kind == "state" and prefix and self.pages[prefix].get(STATE) is None:
                return False
        return True

    def match(self, ids: list[int]) -> Prefix:
        best: Prefix = ()
        for prefix in self.prefixes(ids):
            if prefix not in self.pages:
                break
            best = prefix if self.usable(prefix) else best
        return best

    def forget(self, freed: Pages) -> None:
        for group, pages in freed.items():
            assert len(set(pages)) == len(pages)
            for held in self.pages.values():
                if held.get(group) in pages:
                    pages.remove(held.pop(group))
            assert not pages, "a page is freed that the tree did not have"
        if self.has_full:
            self.pages = {prefix: held for prefix, held in self.pages.items() if FULL in held}


def check(cache: RadixCache, model: Model, pins: list[Pin]) -> None:
    nodes = list(cache.nodes())
    for group in model.groups:
        name = group.name
        cached = sorted(page for node in nodes for page in node.pages[name] if page)
        assert cached == sorted(held[name] for held in model.pages.values() if name in held)
        if group.kind == "full":
            locked = {prefix for pin in pins for prefix in model.prefixes(pin.prefix)}
            assert cache.num_evictable == len(model.pages) - len(locked)
        else:
            pinned = {page for pin in pins for page in pin.tail[name]}
            assert pinned <= set(cached), "a pinned page left"
            assert cache.loose[name].num_evictable == len(cached) - len(pinned)
    for node in nodes:
        assert node.lock_ref == sum(child.lock_ref for child in node.children.values()) + sum(
            p.node is node for p in pins
        )
        assert model.has_full or node.children or node.lock_ref or any(map(any, node.pages.values())), "an empty leaf"


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([1, 2, 3]), st.sampled_from(MODELS), STEPS)
def test_the_tree_agrees_with_a_dictionary(
    page_size: int, groups: tuple[GroupSpec, ...], steps: list[tuple[str, list[int], int]]
) -> None:
    cache, model = RadixCache(page_size, groups), Model(page_size, groups)
    pins: list[Pin] = []
    for action, ids, number in steps:
        if action == "insert":
            insert(cache, model, ids, number)
        elif action in ("match", "pin"):
            expected = model.match(ids)
            assert cache.peek((), ids).num_tokens == len(expected)
            match = cache.match((), ids)
            assert match.num_tokens == match.node.end == len(expected)
            check_match(model, expected, match.pages)
            if action == "pin":
                cache.lock(match.node)
                pins.append(Pin(match.node, expected, cache.pin_tail(match.node)))
        elif action == "move on" and pins:  # a window moves past the first pages of a tail
            pin = pins[len(ids) % len(pins)]
            for name, tail in pin.tail.items():
                cache.unpin_tail(pin.node, name, tail[:number])
                del tail[:number]
        elif action == "unpin" and pins:
            pin = pins.pop(len(ids) % len(pins))
            for name, tail in pin.tail.items():
                cache.unpin_tail(pin.node, name, tail)
            cache.unlock(pin.node)
            forget_empty_leaves(cache, model)
        elif action == "evict":
            evict(cache, model, number, groups[len(ids) % len(groups)])
            forget_empty_leaves(cache, model)
        check(cache, model, pins)


def insert(cache: RadixCache, model: Model, ids: list[int], num_gone: int) -> None:
    """Of windowed groups all pages but the first few; every other time a state."""
    prefixes = list(model.prefixes(ids))
    if not prefixes:
        return
    given: Pages = {}
    for group in model.groups:
        gone = 0 if group.window is None else min(num_gone, len(prefixes) - 1)
        count = len(prefixes) if group.kind != "state" else num_gone % 2
        given[group.name] = [0] * gone + [model.new_page() for _ in range(count - gone)]
    inserted = cache.insert((), ids[: len(prefixes[-1])], given)
    for group in model.groups:
        at = prefixes if group.kind != "state" else prefixes[-1:]
        duplicates = []
        for prefix, page in zip(at, given[group.name], strict=False):
            kept = model.pages.setdefault(prefix, {})
            if page and kept.setdefault(group.name, page) != page:
                duplicates.append(page)
        for prefix in prefixes:
            model.pages.setdefault(prefix, {})
        assert inserted.duplicates[group.name] == duplicates
        assert inserted.pages[group.name] == [model.pages[prefix].get(group.name, 0) for prefix in at]


def check_match(model: Model, prefix: Prefix, pages: Pages) -> None:
    held = [model.pages[p] for p in model.prefixes(prefix)]
    for group in model.groups:
        if group.kind == "full":
            assert pages[FULL] == [h[FULL] for h in held]
        elif group.kind == "state":
            assert pages[STATE] == [h[STATE] for h in held[-1:]]
        else:
            first = max(0, len(prefix) - (group.window or 0)) // model.page_size
            assert pages[group.name] == [0] * first + [h.get(group.name, 0) for h in held[first:]]


def evict(cache: RadixCache, model: Model, number: int, group: GroupSpec) -> None:
    if group.kind == "full":
        before = cache.num_evictable
        freed = cache.evict(number)
        assert len(freed[FULL]) == min(number, before)
    else:
        before = cache.loose[group.name].num_evictable
        freed = {group.name: cache.evict_loose(group.name, number)}
        assert len(freed[group.name]) == min(number, before)
    model.forget(freed)


def forget_empty_leaves(cache: RadixCache, model: Model) -> None:
    """Without a full group, what the tree knows of a prefix may end with its last page; nobody could match it."""
    if model.has_full:
        return
    known = {prefix for node in cache.nodes() for prefix in model.prefixes(tokens_to(node))}
    assert all(not held for prefix, held in model.pages.items() if prefix not in known)
    model.pages = {prefix: held for prefix, held in model.pages.items() if prefix in known}


def tokens_to(node: RadixNode | None) -> Prefix:
    tokens: list[int] = []
    while node is not None:
        tokens, node = node.tokens + tokens, node.parent
    return tuple(tokens)


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 9), st.integers(1, 4))
def test_the_longest_covered_prefix(present: list[bool], window: int, page_size: int) -> None:
    def ok(end: int) -> bool:
        return all(present[p // page_size] for p in range(max(0, end * page_size - window + 1), end * page_size))

    pages = [i + 1 if held else 0 for i, held in enumerate(present)]
    for limit in range(len(pages) + 1):
        assert covered(pages, limit, window, page_size) == max(end for end in range(limit + 1) if ok(end))


def filled(groups: tuple[GroupSpec, ...], num_tokens: int) -> RadixCache:
    cache = RadixCache(1, groups)
    pages = {g.name: list(range(1, num_tokens + 1)) if g.kind != "state" else [1] for g in groups}
    cache.insert((), list(range(num_tokens)), pages)
    return cache


def test_window_pages_leave_the_earliest_first_and_the_end_stays_usable() -> None:
    cache = filled((FULL_GROUP, FAR), 10)
    assert cache.evict_loose(FAR.name, 4) == [1, 2, 3, 4]
    assert cache.match((), list(range(10))).num_tokens == 10
    assert cache.match((), list(range(7))).num_tokens == 0, "token 7 would read token 3"
    assert cache.match((), list(range(8))).num_tokens == 8


def test_a_lock_pins_all_full_pages_and_the_last_window() -> None:
    cache = filled((FULL_GROUP, FAR), 10)
    node = cache.match((), list(range(10))).node
    cache.lock(node)
    tail = cache.pin_tail(node)
    assert tail == {FAR.name: [6, 7, 8, 9, 10]}
    freed = cache.reset()
    assert (freed[FULL], sorted(freed[FAR.name])) == ([], [1, 2, 3, 4, 5])
    cache.unpin_tail(node, FAR.name, tail[FAR.name][:2])
    assert cache.evict_loose(FAR.name, 9) == [6, 7]


def test_a_gap_is_filled_by_who_computes_the_prefix_again() -> None:
    cache = filled((FULL_GROUP, NEAR), 4)
    cache.evict_loose(NEAR.name, 4)
    version = cache.version
    given = cache.insert((), list(range(4)), {FULL: [11, 12, 13, 14], NEAR.name: [0, 0, 23, 24]})
    assert given.pages == {FULL: [1, 2, 3, 4], NEAR.name: [0, 0, 23, 24]}
    assert given.duplicates == {FULL: [11, 12, 13, 14], NEAR.name: []}
    assert cache.match((), list(range(4))).num_tokens == 4 and cache.version != version


def test_a_match_ends_at_a_state_and_a_state_leaves_with_the_end_of_its_run() -> None:
    cache = filled((FULL_GROUP, STATES), 6)
    assert cache.match((), [0, 1, 2, 3]).num_tokens == 0
    cache.insert((), [0, 1, 2], {FULL: [21, 22, 23], STATE: [2]})
    assert cache.match((), [0, 1, 2, 3]).pages == {FULL: [1, 2, 3], STATE: [2]}
    assert cache.match((), list(range(6))).pages[STATE] == [1]
    freed = cache.evict(1)
    assert freed == {FULL: [6], STATE: [1]}
    assert cache.match((), list(range(6))).num_tokens == 3


def test_the_least_recently_used_state_leaves_first() -> None:
    cache = RadixCache(1, (FULL_GROUP, STATES))
    for first, state in ((10, 1), (20, 2), (30, 3)):
        cache.insert((), [first], {FULL: [first], STATE: [state]})
    cache.match((), [10])
    assert cache.evict_loose(STATE, 2) == [2, 3]
    assert [cache.match((), [first]).num_tokens for first in (10, 20, 30)] == [1, 0, 0]


def test_unpinning_what_nobody_pinned_is_a_bug() -> None:
    cache = filled((FULL_GROUP, NEAR), 3)
    node = cache.match((), [0, 1, 2]).node
    with pytest.raises(KeyError):
        cache.unpin_tail(node, NEAR.name, [3])


def test_pages_of_a_tail_that_spans_nodes_leave_once_it_is_unpinned() -> None:
    cache = RadixCache(1, (FULL_GROUP, FAR))
    for end in range(1, 9):  # one node a token
        cache.insert((), list(range(end)), {FULL: list(range(1, end + 1)), FAR.name: [*[0] * (end - 1), end]})
    node = cache.match((), list(range(8))).node
    cache.lock(node)
    tail = cache.pin_tail(node)
    assert cache.evict_loose(FAR.name, 8) == [1, 2, 3]
    cache.unpin_tail(node, FAR.name, tail[FAR.name])
    assert sorted(cache.evict_loose(FAR.name, 8)) == [4, 5, 6, 7, 8]
