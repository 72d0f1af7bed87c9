"""The demo checkpoint: a very small Qwen3-architecture chat model, shipped as package data (`--model-path demo`)."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder that holds config, weights and tokenizer."""
    return Path(__file__).parent
