"""One checkpoint of random weights that every engine loads: safetensors with a config, and the same numbers as GGUF.

The tokenizer that goes with it has a word an id ("w17"), so that servers, which want one, have text to make of their ids.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

CONFIGS = Path(__file__).parents[2] / "configs"
STD = 0.02  # what the published models were initialised with
DONE = ".complete"
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def checkpoint(shape: str, work: Path, num_layers: int | None = None) -> Path:
    """The folder of `benchmarks/configs/SHAPE.json` with weights; written once, complete or not at all.

    `num_layers` cuts the model to so many.
    """
    folder = work / (shape if num_layers is None else f"{shape}-{num_layers}-layers")
    config = json.loads((CONFIGS / f"{shape}.json").read_text())
    config["num_hidden_layers"] = num_layers or config["num_hidden_layers"]
    if (folder / DONE).exists() and json.loads((folder / "config.json").read_text()) == config:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    save_file(
        {name: _weight(name, dims, generator) for name, dims in tensors(config)},
        str(folder / "model.safetensors"),
        {"format": "pt"},
    )
    _write_tokenizer(folder, config["vocab_size"])
    (folder / DONE).touch()
    return folder


def tensors(config: dict[str, Any]) -> Shapes:
    """Names and shapes as Llama, Qwen3 and Qwen3-MoE checkpoints have them."""
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for name, rows in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            yield f"{layer}.self_attn.{name}.weight", (rows * head_dim, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, heads * head_dim)
        if config["model_type"] in ("qwen3", "qwen3_moe"):
            yield f"{layer}.self_attn.q_norm.weight", (head_dim,)
            yield f"{layer}.self_attn.k_norm.weight", (head_dim,)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if num_experts := config.get("num_experts", 0):
            yield f"{layer}.mlp.gate.weight", (num_experts, hidden)
            for expert in range(num_experts):
                yield from _mlp(f"{layer}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        else:
            yield from _mlp(f"{layer}.mlp", hidden, config["intermediate_size"])
    yield "model.norm.weight", (hidden,)


def _mlp(prefix: str, hidden: int, width: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def _weight(name: str, dims: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms near 1 and not at it, so that an engine that leaves one out is seen."""
    noise = torch.randn(dims, generator=generator)
    return (1 + 0.1 * noise if "norm" in name else noise * STD).bfloat16()


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": f"w{vocab_size - 1}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))


def gguf(folder: Path, python: Path) -> Path:
    """The same weights for llama.cpp, written by the environment that has the `gguf` package."""
    target = folder / "model.gguf"
    if not target.exists():
        writer = Path(__file__).with_name("write_gguf.py")
        subprocess.run([python, writer, folder, target.with_suffix(".partial")], check=True)
        target.with_suffix(".partial").rename(target)
    return target


def weight_bytes(folder: Path) -> int:
    """Bytes that a decode step of a dense model reads: all of them, as the embedding is the head too."""
    return (folder / "model.safetensors").stat().st_size
