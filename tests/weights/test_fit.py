from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sglang_core.backend.pool import PoolSpec
from sglang_core.backend.state_pool import StatePoolSpec
from sglang_core.errors import ConfigError
from sglang_core.types import FULL
from sglang_core.weights.fit import GIB, FitTable
from sglang_core.weights.pool_sizes import PoolSizes


def pools(bytes_per_token: int, page_size: int, **more: PoolSpec) -> PoolSizes:
    """One full pool of int8 codes, and others."""
    full = PoolSpec(
        num_layers=bytes_per_token,
        page_size=page_size,
        num_kv_heads=1,
        head_dim=1,
        v_head_dim=0,
        dtype=torch.uint8,
    )
    return PoolSizes(
        specs={FULL: full, **more},
        page_size=page_size,
        context_length=8192,
        max_running=64,
        tokens_in_flight=4096,
        states_per_req=4,
    )


TABLE = FitTable(
    device="cpu:0",
    total=16 * GIB,
    free=12 * GIB,
    mem_fraction=0.75,
    weights=2 * GIB,
    activations=GIB // 2,
    pools=pools(64 * 1024, 16),
    context_length=8192,
)


def test_the_numbers_add_up() -> None:
    assert TABLE.headroom == 4 * GIB
    assert TABLE.kv == 6 * GIB
    assert TABLE.kv_tokens == 6 * GIB // (64 * 1024) - 16  # one page is scratch
    assert TABLE.largest_context == 8192
    TABLE.check()
    assert replace(TABLE, activations=5 * GIB).kv == 5 * GIB


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(
        ConfigError, match=r"does not fit: cpu:0 has 12.00 GiB of 16.00 GiB free, weights take 9.00 GiB"
    ):
        replace(TABLE, weights=9 * GIB).check()


def test_a_context_that_does_not_fit_names_the_largest_that_does() -> None:
    big = replace(TABLE, context_length=131072)
    with pytest.raises(
        ConfigError, match=rf"context_length=131072 needs 8.00 GiB.*--context-length to {big.kv_tokens} "
    ):
        big.check()
    replace(TABLE, context_length=big.kv_tokens).check()
    with pytest.raises(ConfigError, match=r"max_total_tokens=200000 needs 12.21 GiB.*--max-total-tokens"):
        replace(TABLE, max_total_tokens=200000).check()
    assert replace(TABLE, max_total_tokens=4096).largest_context == 4096


@given(st.integers(0, 12), st.integers(1, 200000), st.integers(1, 64))
def test_what_it_grants_fits_and_one_page_more_would_not(weights: int, kv_per_token: int, page_size: int) -> None:
    table = replace(TABLE, weights=weights * GIB, pools=pools(kv_per_token, page_size))
    page = kv_per_token * page_size
    used = table.kv_tokens * kv_per_token + page
    if table.kv_tokens:
        assert used <= table.kv < used + page
    else:
        assert table.kv < 2 * page


WINDOW = PoolSpec(
    group="window-512",
    window=512,
    num_layers=64 * 1024,
    page_size=16,
    num_kv_heads=1,
    head_dim=1,
    v_head_dim=0,
    dtype=torch.uint8,
)
STATES = StatePoolSpec(
    num_layers=1, conv_shape=(3, 4), conv_dtype=torch.uint8, state_shape=(1, 4, 1024), state_dtype=torch.uint8
)


def test_a_windowed_pool_is_smaller_and_leaves_the_rest_to_the_full_one() -> None:
    sizes = pools(64 * 1024, 16, window=WINDOW)
    assert sizes.main_group == FULL
    table = replace(TABLE, pools=sizes)
    counts = sizes.pages(table.kv_tokens // 16)
    assert TABLE.kv_tokens / 2 < table.kv_tokens < TABLE.kv_tokens
    running = table.kv_tokens // 4096  # reqs of that length, or of four windows where those are longer
    assert counts["window"] >= running * (512 // 16 + 1) + 4096 // 16
    assert counts["window"] < counts[FULL] / 2
    assert sizes.nbytes(counts[FULL]) <= table.kv < sizes.nbytes(counts[FULL] + 1)


def test_a_windowed_pool_never_has_more_pages_than_the_full_one() -> None:
    sizes = pools(1024, 16, window=WINDOW)
    assert sizes.pages(20) == {FULL: 20, "window": 20}


def test_where_every_layer_is_windowed_that_pool_is_the_main_one() -> None:
    sizes = replace(pools(1024, 16), specs={"window": WINDOW})
    assert sizes.main_group == "window" and sizes.pages(77) == {"window": 77}
    assert sizes.useful() == 5 * (64 * (510 // 16 + 1 + 3) + 256), (
        "windows, what a step writes, and four times that cached"
    )
    assert replace(sizes, context_length=256).useful() == 64 * 16, "or every context whole"


def test_states_are_counted_by_req() -> None:
    sizes = pools(1024, 16, state=STATES)
    assert sizes.bytes_per_token == 1024, "states are not counted by token"
    assert [sizes.pages(n)["state"] for n in (1, 4096 // 16, 8 * 4096 // 16, 10**6)] == [5, 5, 40, 64 * 5]
    assert sizes.nbytes(256) == 257 * 16 * 1024 + 6 * (12 + 4096)


def test_it_renders_each_pool() -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(replace(TABLE, pools=pools(64 * 1024, 16, window=WINDOW)).render())
    assert "- window" in capture.get() and "- full" in capture.get()


def test_it_renders() -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(TABLE.render())
    text = capture.get()
    assert "weights" in text and "2.00" in text and "largest context" in text
