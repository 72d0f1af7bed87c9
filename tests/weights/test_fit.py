from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sglang_core.errors import ConfigError
from sglang_core.weights.fit import GIB, FitTable

TABLE = FitTable(
    device="cpu:0",
    total=16 * GIB,
    free=12 * GIB,
    mem_fraction=0.75,
    weights=2 * GIB,
    activations=GIB // 2,
    kv_per_token=64 * 1024,
    page_size=16,
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
    table = replace(TABLE, weights=weights * GIB, kv_per_token=kv_per_token, page_size=page_size)
    page = kv_per_token * page_size
    used = table.kv_tokens * kv_per_token + page
    if table.kv_tokens:
        assert used <= table.kv < used + page
    else:
        assert table.kv < 2 * page


def test_it_renders() -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(TABLE.render())
    text = capture.get()
    assert "weights" in text and "2.00" in text and "largest context" in text
