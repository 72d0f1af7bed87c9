"""Kernels run through Triton's interpreter here: set before triton is first imported, which is when it is read."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator

import pytest
from sglang_triton import tuning
from sglang_triton.interpreter import quicken

quicken()


@pytest.fixture(params=[tuning.INTERPRETER, "sm_90"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels with the tile sizes of the interpreter, which are large, and with those of a device."""
    monkeypatch.setattr(tuning, "current_arch", lambda: request.param)
    tuning.choose.cache_clear()
    yield request.param
    tuning.choose.cache_clear()
