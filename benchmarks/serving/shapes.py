"""Models of real shapes with random weights, and what the scripts here have in common."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULT_SHAPE = "qwen3-0.6b"


@contextmanager
def model_folder(shape: str) -> Iterator[str]:
    """A folder with the config of `benchmarks/configs/SHAPE.json`; weights are then --load-format dummy."""
    config = CONFIGS / f"{shape}.json"
    if not config.is_file():
        known = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.json")))
        raise SystemExit(f"no shape {shape!r}; there are {known}")
    with tempfile.TemporaryDirectory(prefix="sglang-bench-") as folder:
        shutil.copy(config, Path(folder) / "config.json")
        yield folder


def dummy_engine_settings(folder: str, device: str) -> dict[str, object]:
    """Engine settings for a model of random weights that answers ids."""
    return {
        "model_path": folder,
        "device": device,
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "context_length": 4096,
    }


def spread(values: Sequence[float]) -> str:
    """ "median (low-high)"."""
    ordered = sorted(values)
    middle = (
        ordered[len(ordered) // 2]
        if len(ordered) % 2
        else (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2
    )
    return f"{middle:.3g} ({ordered[0]:.3g}-{ordered[-1]:.3g})"


def save(path: str | None, facts: object) -> None:
    if path:
        Path(path).write_text(json.dumps(facts, indent=1) + "\n")
