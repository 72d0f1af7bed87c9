"""Single steps of published shapes with some facts of their config.json changed: what the scripts in mla/ and moe/ have in common."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglang_core.bench.step import StepDriver, StepShape, open_rank
from sglang_core.config import EngineConfig
from sglang_core.engine.build import Rank

CONFIGS = Path(__file__).parent / "configs"


def open_shape(
    shape: str,
    step: StepShape,
    *,
    device: str,
    dtype: str,
    changes: dict[str, Any],
    **settings: Any,
) -> tuple[Rank, StepDriver]:
    """A rank of `configs/SHAPE.json` with `changes`, random weights, and a pool that holds `step`."""
    with _folder(json.loads((CONFIGS / f"{shape}.json").read_text()) | changes) as folder:
        config = EngineConfig.from_flat(
            model_path=folder,
            device=device,
            dtype=dtype,
            load_format="dummy",
            skip_tokenizer_init=True,
            context_length=max(step.length, 128),
            chunked_prefill_size=max(step.num_tokens, 2),  # the least that an engine takes
            **settings,
        )
        rank = open_rank(config, [step])
    return rank, StepDriver.of(rank)


@contextmanager
def _folder(config: dict[str, Any]) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="sglang-bench-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder
