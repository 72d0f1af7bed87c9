from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_core import Engine


@pytest.fixture(scope="package")
def engine() -> Iterator[Engine]:
    """The demo model in float32 on the reference backend, where greedy output is exact."""
    with Engine(
        model_path="demo",
        device="cpu",
        dtype="float32",
        in_process=True,
        max_total_tokens=8192,
        chunked_prefill_size=64,
    ) as engine:
        yield engine
