"""A checkpoint of random weights for a config.json, a file a layer, as a Llama or a Qwen3 has it.

It is written once a machine: the host has it cached, and loads it in seconds. Drawing eight billion weights takes a minute for every case.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PERIOD = 65_521


def kept_checkpoint(config: Path) -> Path:
    """The folder of a checkpoint for `config`, where earlier cases and runs on this machine left it; else it is written now."""
    folder = Path(tempfile.gettempdir()) / f"sglang-gpu-{os.getuid()}" / config.stem
    if not folder.exists():
        new = folder.with_suffix(".new")  # and renamed once it is whole
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        shutil.copy(config, new / "config.json")
        write_checkpoint(new)
        os.rename(new, folder)
    return folder


def write_checkpoint(folder: Path) -> int:
    """Beside its config.json. -> bytes written."""
    config = json.loads((folder / "config.json").read_text())
    drawn = torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    total, index = 0, {}
    for i, shapes in enumerate(files_of(config)):
        name = f"model-{i:05}.safetensors"
        tensors = {key: made(drawn, shape) for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        total += sum(x.numel() * x.element_size() for x in tensors.values())
        index |= dict.fromkeys(tensors, name)
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    return total


def made(drawn: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:  # a norm's
        return torch.ones(shape, dtype=drawn.dtype)
    count = shape[0] * shape[1]
    return drawn.repeat(-(-count // PERIOD))[:count].view(shape)


def files_of(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes, a file each: embedding, head and last norm, then the layers."""
    width, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    dim = config.get("head_dim", width // config["num_attention_heads"])
    heads, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    head = {} if config.get("tie_word_embeddings") else {"lm_head.weight": (vocab, width)}
    yield {"model.embed_tokens.weight": (vocab, width), **head, "model.norm.weight": (width,)}
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        norms = ("q_norm", "k_norm") if config["model_type"] == "qwen3" else ()
        yield {
            **{f"{at}.self_attn.{name}.weight": (dim,) for name in norms},
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.post_attention_layernorm.weight": (width,),
            f"{at}.self_attn.q_proj.weight": (heads, width),
            f"{at}.self_attn.k_proj.weight": (kv, width),
            f"{at}.self_attn.v_proj.weight": (kv, width),
            f"{at}.self_attn.o_proj.weight": (width, heads),
            f"{at}.mlp.gate_proj.weight": (mlp, width),
            f"{at}.mlp.up_proj.weight": (mlp, width),
            f"{at}.mlp.down_proj.weight": (width, mlp),
        }
