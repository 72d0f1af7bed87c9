"""The prefix tree: which runs of tokens have their KV in which pages. Host integers only, no torch.

A node is a run of whole pages. Its children are keyed by their first page of tokens, so one hash decides where to descend and
whole runs are then compared in bulk; two runs that part inside a page share nothing of it. A namespace is part of the key below
the root, so namespaces never meet and eviction is global over them.

Pool groups differ in what of a prefix is read later. Of a full group every page is, so a node has them all, they are pinned by
path and leave from the ends of leaves. Of a windowed group only the last few are, and of states only the one at the end: such
pages may be gone while their node stays (loose_pages.py), and a match ends where all that is read from there on is held.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sglang_core.cache.loose_pages import GONE, LoosePages, covered
from sglang_core.types import FULL_GROUP, GroupSpec, PoolGroup

Namespace = tuple[str, ...]
# A group lists one page per page of tokens; GONE where a windowed group has none. One of states lists the state at the end, if any.
Pages = dict[PoolGroup, list[int]]


@dataclass(eq=False, slots=True)
class RadixNode:
    """A run of cached pages. `lock_ref` counts the pins of this node or below, so an unpinned node has no pinned descendant.

    A split keeps this object as the lower part: who holds a node holds the end of a path, whatever is split above it.
    """

    tokens: list[int]
    pages: Pages
    parent: RadixNode | None
    key: Hashable  # under which the parent lists it
    children: dict[Hashable, RadixNode] = field(default_factory=dict)
    end: int = 0  # tokens from the root to its end
    lock_ref: int = 0
    last_used: int = 0  # tick of the tree, not seconds
    queued: bool = False  # has its one entry in the eviction heap


class EvictionPolicy(Protocol):
    """Which unpinned leaf leaves first."""

    def rank(self, node: RadixNode) -> float:
        """The lowest rank leaves first. Using a node may raise its rank and must not lower it: the heap re-ranks lazily."""


class LRU:
    """The run that was matched or inserted longest ago leaves first."""

    def rank(self, node: RadixNode) -> float:
        return node.last_used


EVICTION_POLICIES: Mapping[str, type[EvictionPolicy]] = {"lru": LRU}


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: the node that ends it (pin it to keep it), its tokens, its pages in position order."""

    node: RadixNode
    num_tokens: int
    pages: Pages


@dataclass(frozen=True, slots=True)
class Peek:
    """Where the longest cached prefix ends, found without changing anything; it may be out of date after any change."""

    node: RadixNode  # the last one shared whole
    node_end: int
    ends_in: RadixNode  # `node`, or a child of it of which only the first pages are shared
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Insertion:
    """What the tree now holds for a run: the node that ends it, its pages, and the given pages that it did not take."""

    node: RadixNode
    pages: Pages
    duplicates: Pages


class RadixCache:
    """Page-granular radix tree. It owns the pages it was given until `evict`, `evict_loose` or `reset` hands them back."""

    def __init__(
        self, page_size: int, groups: Sequence[GroupSpec] = (FULL_GROUP,), policy: EvictionPolicy | None = None
    ) -> None:
        self.page_size = page_size
        self.groups = tuple(group.name for group in groups)
        self._policy = policy or LRU()
        self._full = tuple(group.name for group in groups if group.kind == "full")
        self._windows = {group.name: group.window for group in groups if group.window is not None}
        self._states = tuple(group.name for group in groups if group.kind == "state")
        self.loose: dict[PoolGroup, LoosePages[RadixNode]] = {
            name: LoosePages(name, self._policy.rank) for name in (*self._windows, *self._states)
        }
        assert len(self._full) + len(self.loose) == len(self.groups), "the tree holds full, windowed and state groups"
        self.root = RadixNode([], {g: [] for g in self.groups}, None, ())
        self._tick = 0
        self._heap: list[tuple[float, int, RadixNode]] = []  # leaves that may leave; stale entries are dropped when met
        self._num_pushed = 0  # breaks ties between ranks
        self.version = 0  # changes whenever a match may give something else
        self.num_pages = 0  # pages the tree owns, in each group
        self.num_evictable = 0  # those of them that no pin holds

    def match(self, namespace: Namespace, ids: Sequence[int]) -> Match:
        """The longest prefix of `ids` held, in whole pages. Marks it used and ends it at a node of its own."""
        node, pos, child, shared = self._walk(self.root, namespace, ids)
        if self.loose:
            node, pos, child, shared = self._usable(node, pos, child, shared)
        if child is not None and shared:
            node, pos = self._split(child, shared), pos + shared
        self._tick += 1
        path = list(self._path(node))
        pages: Pages = {group: [] for group in self.groups}
        for step in reversed(path):
            step.last_used = self._tick
            for group in self._full:
                pages[group] += step.pages[group]
        if self.loose:
            pages |= self.tail(node)
        return Match(node, pos, pages)

    def peek(self, namespace: Namespace, ids: Sequence[int], known: Peek | None = None) -> Peek:
        """What `match` would find. An earlier answer for the same ids, if it still holds, saves comparing them again."""
        if known is None or known.node.end != known.node_end:  # pages were taken off its end, perhaps all
            node, start = self.root, 0
        else:
            node, start = known.node, known.node_end
        node, pos, child, shared = self._walk(node, namespace, ids, start)
        if self.loose:
            node, pos, child, shared = self._usable(node, pos, child, shared)
        return Peek(node, pos, child if child is not None and shared else node, pos + shared)

    def insert(
        self,
        namespace: Namespace,
        ids: Sequence[int],
        pages: Mapping[PoolGroup, Sequence[int]],
        below: RadixNode | None = None,
    ) -> Insertion:
        """Give the tree the whole pages of `ids`, which follow the pinned node `below` (the root by default).

        Where the tree has a run already, its own pages stay and the given ones come back as duplicates, unless they are
        the same. The caller frees those. Where a windowed group gives GONE the tree has a gap, and a page given fills a gap.
        A state is that at the end of `ids`.
        """
        assert len(ids) % self.page_size == 0, "only whole pages are inserted"
        run = list(ids)
        self._tick += 1
        node, pos, child, shared = self._walk(below or self.root, namespace, run)
        if child is not None and shared:
            node, pos = self._split(child, shared), pos + shared
        num_held = pos // self.page_size
        if pos < len(run):
            rest = {g: list(pages[g][num_held:]) for g in (*self._full, *self._windows)}
            node = self._append(node, namespace, run[pos:], rest | {g: [GONE] for g in self._states})
        held: Pages = {group: [] for group in self.groups}
        for step in reversed(list(self._path(node, below))):
            step.last_used = self._tick
            for group in self._windows:
                first = len(held[group])
                self._fill_gaps(group, step, pages[group][first : first + len(step.pages[group])])
            for group in (*self._full, *self._windows):
                held[group] += step.pages[group]
        for group in self._states:
            if node is not self.root:
                self._fill_gaps(group, node, pages[group])
                held[group] = list(node.pages[group])
        duplicates = {
            g: [mine for mine, kept in zip(pages[g], held[g], strict=False) if mine not in (kept, GONE)]
            for g in self.groups
        }
        return Insertion(node, held, duplicates)

    def lock(self, node: RadixNode) -> None:
        """Pin the path to `node`: none of its pages is evicted until `unlock`."""
        for step in self._path(node):
            if step.lock_ref == 0:
                self.num_evictable -= self._num_pages_of(step)
            step.lock_ref += 1

    def unlock(self, node: RadixNode) -> None:
        for step in self._path(node):
            assert step.lock_ref > 0, "a node is unpinned that nobody pinned"
            step.lock_ref -= 1
            if step.lock_ref == 0:
                self.num_evictable += self._num_pages_of(step)
                self._offer(step)
        if not self._full:
            self._prune(node)

    def tail(self, node: RadixNode) -> Pages:
        """What of the loose groups is read by who goes on from the end of `node`.

        Of a windowed group as many columns as tokens from the root, GONE before the last `window` tokens; of states the one
        there, if any.
        """
        pages: Pages = {}
        for group, window in self._windows.items():
            first = max(0, node.end - window) // self.page_size
            pages[group] = [GONE] * first + self._columns(group, node, first)
        for group in self._states:
            pages[group] = [state for state in node.pages[group] if state != GONE]
        return pages

    def pin_tail(self, node: RadixNode) -> Pages:
        """Pin `tail(node)`, whose path is locked, page by page: `unpin_tail` may give some back before the others."""
        pages = {group: [page for page in held if page != GONE] for group, held in self.tail(node).items()}
        for group, held in pages.items():
            self.loose[group].pin(held)
        return pages

    def unpin_tail(self, node: RadixNode, group: PoolGroup, pages: Sequence[int]) -> None:
        """Pages that `pin_tail(node)` pinned may leave. The path is still locked."""
        loose, reach = self.loose[group], self._windows.get(group, 0)
        loose.unpin(pages)
        first = max(0, node.end - reach)
        while node.parent is not None:
            loose.offer(node)
            node = node.parent
            if node.end <= first:
                break

    def evict_loose(self, group: PoolGroup, num_pages: int) -> list[int]:
        """Let go of unpinned pages of a loose group, those of the node of lowest rank first, until so many are freed.

        Nodes stay, but for leaves that hold nothing any more.
        """
        freed, nodes = self.loose[group].evict(num_pages)
        self.version += bool(freed)
        if not self._full:
            for node in nodes:
                self._prune(node)
        return freed

    def evict(self, num_pages: int) -> Pages:
        """Drop unpinned runs, lowest rank first, until `num_pages` pages of each full group are freed or none is left.

        Pages leave from the end of a leaf, so no more of a long run is lost than is asked for. What loose groups have of them
        is freed too.
        """
        freed: Pages = {group: [] for group in self.groups}
        wanted = num_pages
        while wanted > 0 and self._heap:
            rank, _, node = self._heap[0]
            if not self._may_leave(node):
                heapq.heappop(self._heap)
                node.queued = False
            elif (now := self._policy.rank(node)) != rank:
                self._num_pushed += 1
                heapq.heapreplace(self._heap, (now, self._num_pushed, node))
            else:
                wanted -= self._trim(node, wanted, freed)
        return freed

    def reset(self) -> Pages:
        """Drop every run that no pin holds, and every loose page."""
        freed = self.evict(self.num_evictable) if self._full else {group: [] for group in self.groups}
        for group, loose in self.loose.items():
            freed[group] += self.evict_loose(group, loose.num_evictable)
        return freed

    def nodes(self) -> Iterator[RadixNode]:
        """Every node but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def _walk(
        self, node: RadixNode, namespace: Namespace, ids: Sequence[int], pos: int = 0
    ) -> tuple[RadixNode, int, RadixNode | None, int]:
        """Follow `ids[pos:]` below `node`: the last node shared whole, where it ends, the next child, tokens shared of it."""
        size = self.page_size
        while (child := self._child(node, namespace, ids, pos)) is not None:
            whole = min(len(child.tokens), (len(ids) - pos) // size * size)
            shared = common_pages(child.tokens, ids[pos : pos + whole], size)
            if shared < len(child.tokens):
                return node, pos, child, shared
            node, pos = child, pos + shared
        return node, pos, None, 0

    def _usable(
        self, node: RadixNode, pos: int, child: RadixNode | None, shared: int
    ) -> tuple[RadixNode, int, RadixNode | None, int]:
        """What `_walk` found, cut to the longest prefix after which every loose group has what is read next."""
        last = child if child is not None and shared else node
        end = (pos + shared) // self.page_size
        columns = {group: self._columns(group, last, 0) for group in self._windows}
        while end:
            before = end
            for group, window in self._windows.items():
                end = covered(columns[group], end, window, self.page_size)
            for group in self._states:
                end = self._last_state(group, last, end * self.page_size) // self.page_size
            if end == before:
                break
        stop = end * self.page_size
        while last.parent is not None and last.end - len(last.tokens) >= stop:
            last = last.parent
        if last.end == stop:
            return last, stop, None, 0
        assert last.parent is not None
        return last.parent, last.parent.end, last, stop - last.parent.end

    def _last_state(self, group: PoolGroup, node: RadixNode, stop: int) -> int:
        """The end of the last node up to `node` with a state, at most `stop` tokens in; 0, where every req begins, if none."""
        for step in self._path(node):
            if step.end <= stop and step.pages[group][0] != GONE:
                return step.end
        return 0

    def _columns(self, group: PoolGroup, node: RadixNode, first: int) -> list[int]:
        """A windowed group's pages from column `first` to the end of `node`."""
        parts = []
        for step in self._path(node):
            start = (step.end - len(step.tokens)) // self.page_size
            parts.append(step.pages[group][max(0, first - start) :])
            if start <= first:
                break
        return [page for part in reversed(parts) for page in part]

    def _fill_gaps(self, group: PoolGroup, node: RadixNode, pages: Sequence[int]) -> None:
        """Take those of `pages`, one for each that the node lists, of which it has none."""
        held = node.pages[group]
        gaps = [i for i, page in enumerate(pages) if held[i] == GONE and page != GONE]
        for i in gaps:
            held[i] = pages[i]
        if gaps:
            self.version += 1
            self.loose[group].added(node, len(gaps))

    def _child(self, node: RadixNode, namespace: Namespace, ids: Sequence[int], pos: int) -> RadixNode | None:
        if pos + self.page_size > len(ids):
            return None
        return node.children.get(self._key(node, namespace, ids[pos : pos + self.page_size]))

    def _key(self, parent: RadixNode, namespace: Namespace, page: Sequence[int]) -> Hashable:
        return (namespace, tuple(page)) if parent is self.root else tuple(page)

    def _path(self, node: RadixNode, top: RadixNode | None = None) -> Iterator[RadixNode]:
        """`node` and its ancestors below `top`, which is the root by default, bottom first."""
        stop = top or self.root
        while node is not stop:
            yield node
            assert node.parent is not None, "the node was evicted: it was not pinned"
            node = node.parent

    def _append(self, parent: RadixNode, namespace: Namespace, run: list[int], pages: Pages) -> RadixNode:
        node = RadixNode(run, pages, parent, self._key(parent, namespace, run[: self.page_size]))
        node.end, node.last_used = parent.end + len(run), self._tick
        paged = (*self._full, *self._windows)
        assert all(len(pages[g]) * self.page_size == len(run) for g in paged), "one page per page of tokens"
        parent.children[node.key] = node
        self.version += 1
        for group, loose in self.loose.items():
            loose.added(node, len(pages[group]) - pages[group].count(GONE))
        self.num_pages += self._num_pages_of(node)
        self.num_evictable += self._num_pages_of(node)
        self._offer(node)
        return node

    def _split(self, node: RadixNode, num_tokens: int) -> RadixNode:
        """Cut the first `num_tokens` off `node` into a new parent of it, which is returned."""
        assert node.parent is not None
        cut = num_tokens // self.page_size
        pages = {g: [GONE] if g in self._states else p[:cut] for g, p in node.pages.items()}
        upper = RadixNode(node.tokens[:num_tokens], pages, node.parent, node.key)
        upper.end = node.end - len(node.tokens) + num_tokens
        upper.lock_ref, upper.last_used = node.lock_ref, node.last_used
        node.parent.children[node.key] = upper
        node.tokens = node.tokens[num_tokens:]
        node.pages = {g: p if g in self._states else p[cut:] for g, p in node.pages.items()}
        node.parent, node.key = upper, tuple(node.tokens[: self.page_size])
        upper.children[node.key] = node
        for loose in self.loose.values():
            loose.offer(upper)
        return upper

    def _trim(self, node: RadixNode, wanted: int, freed: Pages) -> int:
        """Take up to `wanted` pages off the end of a leaf, the leaf with them if none stays. Returns how many."""
        keep = max(0, self._num_pages_of(node) - wanted)
        taken = self._num_pages_of(node) - keep
        for group in self._full:
            freed[group] += node.pages[group][keep:]
            del node.pages[group][keep:]
        for group, loose in self.loose.items():
            cut = 0 if group in self._states else keep  # a state is that of the end, which is cut off
            gone = [page for page in node.pages[group][cut:] if page != GONE]
            freed[group] += gone
            loose.removed(len(gone))
            node.pages[group][cut:] = [GONE] if group in self._states else []
        del node.tokens[keep * self.page_size :]
        node.end -= taken * self.page_size
        self.version += 1
        self.num_pages -= taken
        self.num_evictable -= taken
        if keep == 0:
            heapq.heappop(self._heap)
            node.queued = False
            self._remove(node)
        return taken

    def _remove(self, node: RadixNode) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        node.parent = None
        self._offer(parent)

    def _prune(self, node: RadixNode) -> None:
        """Where no group is full: remove the node if it is an unlocked leaf that holds nothing, then its ancestors that are."""
        while self._may_leave(node) and all(page == GONE for pages in node.pages.values() for page in pages):
            parent = node.parent
            assert parent is not None
            self.num_pages -= self._num_pages_of(node)
            self.num_evictable -= self._num_pages_of(node)
            self._remove(node)
            node.end = parent.end  # an earlier peek that ends here must not go on from it
            node = parent

    def _may_leave(self, node: RadixNode) -> bool:
        return node.lock_ref == 0 and not node.children and node.parent is not None

    def _offer(self, node: RadixNode) -> None:
        if not node.queued and self._full and self._may_leave(node):
            node.queued = True
            self._num_pushed += 1
            heapq.heappush(self._heap, (self._policy.rank(node), self._num_pushed, node))

    def _num_pages_of(self, node: RadixNode) -> int:
        return len(node.tokens) // self.page_size


def common_pages(a: Sequence[int], b: Sequence[int], page_size: int) -> int:
    """How many leading tokens two lists share, in whole pages. Compares slices, halving where they differ: O(length)."""
    low, high = 0, min(len(a), len(b)) // page_size
    if a[: high * page_size] == b[: high * page_size]:
        return high * page_size
    while high - low > 1:  # pages [0, low) are equal, pages [0, high) are not
        mid = (low + high) // 2
        if a[low * page_size : mid * page_size] == b[low * page_size : mid * page_size]:
            low = mid
        else:
            high = mid
    return low * page_size
