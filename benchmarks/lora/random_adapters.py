"""Adapters with random weights for a model of a given shape, in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapters(config: Path, out: Path, *, count: int, rank: int) -> dict[str, str]:
    """-> name -> folder, for `lora_paths`. Of a Llama-like model: every linear layer of every layer."""
    facts = json.loads(config.read_text())
    shapes = linear_shapes(facts)
    paths = {}
    for i in range(count):
        generator, pairs = torch.Generator().manual_seed(i), {}
        for layer in range(facts["num_hidden_layers"]):
            for name, (rows, columns) in shapes.items():
                block = "mlp" if name in LINEAR[4:] else "self_attn"
                module = f"base_model.model.model.layers.{layer}.{block}.{name}"
                for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                    x = torch.randn(shape, generator=generator) * columns**-0.5
                    pairs[f"{module}.lora_{side}.weight"] = x.bfloat16()
        folder = out / f"a{i}"
        folder.mkdir()
        save_file(pairs, folder / "adapter_model.safetensors")
        peft = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(LINEAR)}
        (folder / "adapter_config.json").write_text(json.dumps(peft))
        paths[folder.name] = str(folder)
    return paths


def linear_shapes(facts: dict[str, Any]) -> dict[str, tuple[int, int]]:
    hidden, inner, heads = facts["hidden_size"], facts["intermediate_size"], facts["num_attention_heads"]
    head_dim = facts.get("head_dim") or hidden // heads
    q, kv = heads * head_dim, facts["num_key_value_heads"] * head_dim
    sizes = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner))
    return dict(zip(LINEAR, sizes, strict=True))
