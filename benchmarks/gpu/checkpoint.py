"""A checkpoint of random weights for a config.json, a file a layer, as a Llama has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

PERIOD = 65_521


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


def files_of(config: dict[str, int]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes, a file each: embedding, head and last norm, then the layers."""
    width, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    dim = config.get("head_dim", width // config["num_attention_heads"])
    heads, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield {
        "model.embed_tokens.weight": (vocab, width),
        "lm_head.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        yield {
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
