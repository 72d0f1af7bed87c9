"""Trees of drafts in one step: every token sees the prefix and its own path, as if that path had been decoded alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglang_core.ops.attention import AttnSpec, attn_paged, attn_plan
from sglang_core.ops.tree_mask import pack_bits, tree_mask_of, tree_words, unpack_bits
from tests.ops.paged_case import CPU, PagedCase, attn_spec, naive_attention, paged_case

Tree = Sequence[int]  # the parent of each token, -1 for a root
PREFIXES = (9, 0, 300)
CHAIN: Tree = [-1, 0, 1, 2]


def tree_spec(**more: object) -> AttnSpec:
    return attn_spec(tree=True, **more)  # type: ignore[arg-type]


def random_tree(size: int, rng: random.Random) -> Tree:
    return [rng.randrange(-1, i) for i in range(size)]


def path(tree: Tree, token: int) -> list[int]:
    """From its root to the token."""
    found = [token]
    while (token := tree[token]) >= 0:
        found.insert(0, token)
    return found


def case_of(trees: Sequence[Tree], spec: AttnSpec, prefixes: Sequence[int] = PREFIXES, **more: object) -> PagedCase:
    reqs = [(prefix, len(tree)) for prefix, tree in zip(prefixes, trees, strict=False)]
    return paged_case(reqs, spec=spec, parents=trees, **more)  # type: ignore[arg-type]


def run(case: PagedCase, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    plan = attn_plan(case.spec, case.batch, CPU)
    o, lse = attn_paged(case.q, case.k, case.v, case.pool, 0, case.spec, plan, sinks=sinks, lse=True)
    return o, lse


def one_path_at_a_time(case: PagedCase, trees: Sequence[Tree], sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each token as the last of a req that holds the prefix and its path alone; float64."""
    o = torch.zeros(case.q.shape[0], case.spec.num_heads, case.spec.v_head_dim, dtype=torch.float64)
    lse = torch.full(o.shape[:2], -math.inf, dtype=torch.float64)
    row = 0
    for r, tree in enumerate(trees):
        prefix = int(case.batch.prefix_lens_cpu[r])
        for token in range(len(tree)):
            seen = [*range(prefix), *(prefix + i for i in path(tree, token))]
            q = case.q[row : row + 1]
            o[row], lse[row] = naive_attention(q, case.keys[r][seen], case.values[r][seen], case.spec, sinks)
            row += 1
    return o, lse


def check(case: PagedCase, trees: Sequence[Tree], sinks: Tensor | None = None) -> None:
    o, lse = run(case, sinks)
    want_o, want_lse = one_path_at_a_time(case, trees, sinks)
    torch.testing.assert_close(o.double(), want_o, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    seed=st.integers(0, 999),
    window=st.sampled_from([None, 1, 3, 12]),
    soft_cap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
    static=st.booleans(),
    page_size=st.sampled_from([1, 4, 16]),
)
def test_a_tree_is_each_of_its_paths(
    sizes: list[int],
    seed: int,
    window: int | None,
    soft_cap: float | None,
    has_sinks: bool,
    static: bool,
    page_size: int,
) -> None:
    rng = random.Random(seed)
    trees = [random_tree(n, rng) for n in sizes]
    spec = tree_spec(num_heads=2, num_kv_heads=1, window=window, soft_cap=soft_cap, has_sinks=has_sinks)
    sinks = torch.tensor([0.5, -1.0]) if has_sinks else None
    check(case_of(trees, spec, seed=seed, static=static, page_size=page_size), trees, sinks)


@pytest.mark.parametrize("window", [None, 2, 40])
@pytest.mark.parametrize("size", [1, 4, 33, 150])
def test_a_chain_is_plain_causal_attention_bit_for_bit(size: int, window: int | None) -> None:
    chain: Tree = range(-1, size - 1)
    spec = tree_spec(window=window)
    case = case_of([chain] * 3, spec)
    plain = replace(case.batch, tree_mask_cpu=None)
    assert all(map(torch.equal, run(case), run(replace(case, batch=plain, spec=replace(spec, tree=False)))))


@pytest.mark.parametrize("feature", ["mask", "window by depth", "prefix"])
def test_each_part_of_the_mask_matters(feature: str) -> None:
    trees: list[Tree] = [[-1, 0, 0, 1, 1, 2, -1], [-1, -1, 0, 1], [-1, 0, 1, 1, 1]]
    case = case_of(trees, tree_spec(window=5, scale=2.0))
    want = one_path_at_a_time(case, trees)[0]
    mask = case.batch.tree_mask_cpu
    assert mask is not None
    changed: dict[str, object] = {
        "mask": {"batch": replace(case.batch, tree_mask_cpu=None)},
        "window by depth": {"spec": tree_spec(scale=2.0)},
        "prefix": {"batch": replace(case.batch, prefix_lens_cpu=case.batch.prefix_lens_cpu - torch.tensor([1, 0, 1]))},
    }
    error = (run(replace(case, **changed[feature]))[0] - want).abs().max()  # type: ignore[arg-type]
    assert float(error) > 10 * 2e-6


def test_reqs_that_verify_nothing_are_chains_beside_trees() -> None:
    trees: list[Tree] = [[-1], list(range(-1, 39)), [-1, 0, 0, 0]]
    check(case_of(trees, tree_spec()), trees)
    check(case_of(trees, tree_spec(), static=True, num_tokens=60, num_reqs=5, max_extend=64, num_pages=90), trees)


def test_a_plan_of_a_bucket_is_refilled_by_another_tree() -> None:
    sizes = {"static": True, "num_tokens": 24, "num_reqs": 3, "max_extend": 8, "num_pages": 80}
    rng = random.Random(1)
    trees = [[random_tree(8, rng) for _ in range(3)] for _ in range(2)]
    first, second = (case_of(t, tree_spec(), seed=i, **sizes) for i, t in enumerate(trees))
    plan = attn_plan(first.spec, first.batch, CPU)
    assert plan.static.tree_words == 1
    assert attn_plan(second.spec, second.batch, CPU, out=plan) is plan
    o = attn_paged(second.q, second.k, second.v, second.pool, 0, second.spec, plan)
    assert isinstance(o, Tensor)
    torch.testing.assert_close(o.double(), one_path_at_a_time(second, trees[1])[0], atol=2e-6, rtol=2e-6)


def test_a_kernel_chosen_without_trees_is_given_none() -> None:
    case = case_of([CHAIN], tree_spec())
    with pytest.raises(AssertionError, match=r"AttnSpec\.tree"):
        attn_plan(attn_spec(), case.batch, CPU)


def test_a_mask_is_packed_by_32() -> None:
    mask = tree_mask_of([[-1, 0, 0], range(-1, 39)])
    assert mask.dtype == torch.int32 and mask.shape == (43, 2) and tree_words(40) == 2
    assert mask[:3].tolist() == [[1, 0], [3, 0], [5, 0]]
    assert mask[-1].tolist() == [-1, 255]
    bits = np.random.default_rng(0).random((5, 96)) < 0.5
    assert np.array_equal(unpack_bits(pack_bits(bits)), bits)


@pytest.mark.parametrize("tree", [[0], [-1, 1], [-1, 2, 0], [-2]])
def test_parents_come_first(tree: Tree) -> None:
    with pytest.raises(ValueError, match="parent"):
        tree_mask_of([tree])
