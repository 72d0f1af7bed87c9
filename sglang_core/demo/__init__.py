"""The demo checkpoint: a very small Qwen3-architecture chat model, shipped as package data (`--model-path demo`)."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder that holds config, weights and tokenizer."""
    return Path(__file__).parent


def adapters() -> dict[str, Path]:
    """The adapters that come with it, by name (`--lora-paths demo:NAME`)."""
    return {folder.name: folder for folder in sorted((path() / "adapters").glob("*")) if folder.is_dir()}
