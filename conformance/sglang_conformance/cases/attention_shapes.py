"""Attention over the sizes that models have, at the edges of pages and windows, and where 32 bits do not reach."""

from __future__ import annotations

from sglang_conformance.case import HALVES, Profile
from sglang_conformance.cases.attention import add_paged, spec_of
from sglang_conformance.cases.kv_step import MIXED, Reqs

HEAD_DIMS = (80, 96, 128, 192, 256)
GROUPS = {"2 to 2": (2, 2), "6 to 2": (6, 2), "16 to 1": (16, 1), "14 to 2": (14, 2), "40 to 8": (40, 8)}

for dim in HEAD_DIMS:
    add_paged(f"mixed, head dim {dim}", MIXED, spec_of(4, 2, dim))
    add_paged(f"decode, head dim {dim}", [(40, 1), (0, 1), (130, 1)], spec_of(4, 2, dim), full=True)
add_paged("values narrower than keys", MIXED, spec_of(4, 2, 192, v_head_dim=128), profile="odd_sizes")
for name, (heads, kv_heads) in GROUPS.items():
    add_paged(f"{name} heads", MIXED, spec_of(heads, kv_heads), full=heads > 8)
add_paged("empty extends", [(5, 0), (30, 1), (0, 4), (64, 0)])
add_paged("no tokens", [(5, 0), (16, 0)])
add_paged("page of 32", MIXED, page_size=32)
add_paged("page of 128", MIXED, page_size=128, full=True)
add_paged("a full page", [(15, 1), (16, 16), (0, 16), (48, 16)])
add_paged("300 reqs", [(i % 37, 1) for i in range(300)], spec_of(2, 1), full=True)
# Queries, keys and values as they come out of one fused projection: side by side, not contiguous.
add_paged("sliced", MIXED, strides=16)
add_paged("sliced at odd places", MIXED, strides=3, profile="odd_sizes")

# Reqs that are one token shorter than the window, just as long, and one and two longer; so for its page, too.
WINDOW = 48
EDGES: Reqs = [(WINDOW + n, 1) for n in (-2, -1, 0, 1)] + [(0, WINDOW + n) for n in (-1, 0, 1)] + [(16, WINDOW)]
add_paged("window, reqs of its length", EDGES, spec_of(window=WINDOW), profile="window")
add_paged(
    "window of a page, reqs of its length",
    [(14, 1), (15, 1), (16, 1), (31, 1), (32, 1)],
    spec_of(window=16),
    profile="window",
)
add_paged("window, long prefill", [(0, 400), (130, 200)], spec_of(window=60), profile="window")
add_paged("sinks, decode", [(40, 1), (0, 1), (700, 1)], spec_of(has_sinks=True), profile="sinks")
add_paged("soft cap, large scores", MIXED, spec_of(scale=20.0, soft_cap=30.0), profile="soft_cap")

PAST = "slots past 2^31 elements"
FAR: Reqs = [(40, 2), (70, 1)]
POOLS: dict[str, Profile] = {"auto": "core", "fp8_e4m3": "kv_fp8", "int8": "kv_int8"}
for kv_dtype, profile in POOLS.items():
    spec = spec_of(8, 8, 128, kv_dtype=kv_dtype)
    add_paged(f"{PAST}, {kv_dtype} pool", FAR, spec, profile=profile, dtypes=HALVES, full=True, far=True)
windowed = spec_of(8, 8, 128, window=30)
add_paged(f"{PAST}, window", FAR, windowed, profile="window", dtypes=HALVES, full=True, far=True)
# Sums over long contexts: a running maximum that is lost, or weights kept in a half type, show here.
for length in (8191, 20_000):
    reqs = [(length - 1, 1), (length // 2, 3)]
    add_paged(f"a context of {length}", reqs, spec_of(4, 2, scale=0.2), page_size=64, full=True)
long_window = spec_of(4, 2, scale=0.2, window=4096)
add_paged("a context of 8191, window", [(8190, 1), (5000, 3)], long_window, page_size=64, profile="window", full=True)
