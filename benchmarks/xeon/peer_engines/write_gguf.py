"""A bfloat16 safetensors checkpoint of a Llama, Qwen3 or Qwen3-MoE as GGUF. Needs numpy and the `gguf` package only.

    python write_gguf.py FOLDER FILE

Three things differ from the safetensors (GGUF's specification, and the rotary embedding's definition):
- llama.cpp turns neighbouring pairs of a Llama head, Hugging Face's checkpoints have the two halves: rows of q and k are reordered.
- Llama 3's scaled rotary frequencies are a tensor of divisors.
- The experts of a layer are one tensor [X, F, M]. Norms and routers are float32.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Array = np.ndarray[Any, Any]
ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def main() -> None:
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((folder / "config.json").read_text())
    weights = read_safetensors(folder / "model.safetensors")
    writer = gguf.GGUFWriter(target, ARCHITECTURES[config["model_type"]])
    write_config(writer, config)
    add(writer, "token_embd.weight", weights["model.embed_tokens.weight"])
    add(writer, "output_norm.weight", weights["model.norm.weight"])
    if (divisors := rope_divisors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    for i in range(config["num_hidden_layers"]):
        write_layer(writer, config, weights, i)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_safetensors(path: Path) -> dict[str, Array]:
    """Name -> uint16 bit patterns of bfloat16, mapped and not read. The format: 8 bytes of length, a JSON header, the data."""
    length = int(np.fromfile(path, "<u8", 1)[0])
    header = json.loads(np.memmap(path, "u1", "r", 8, (length,)).tobytes())
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}; a BF16 checkpoint is wanted"
            found[name] = np.memmap(path, "<u2", "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
    return found


def write_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    if "num_experts" in config:
        writer.add_expert_count(config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def write_layer(writer: gguf.GGUFWriter, config: dict[str, Any], weights: dict[str, Array], i: int) -> None:
    for theirs, ours in LAYER_NAMES.items():
        if (weight := weights.get(f"model.layers.{i}.{theirs}.weight")) is None:
            continue
        if config["model_type"] == "llama" and ours in ("attn_q", "attn_k"):
            weight = neighbours(weight, config["head_dim"])
        add(writer, f"blk.{i}.{ours}.weight", weight)
    for part in ("gate", "up", "down") if "num_experts" in config else ():
        experts = [
            weights[f"model.layers.{i}.mlp.experts.{x}.{part}_proj.weight"] for x in range(config["num_experts"])
        ]
        add(writer, f"blk.{i}.ffn_{part}_exps.weight", np.stack(experts))


def neighbours(weight: Array, head_dim: int) -> Array:
    """[H * D, M] with the two halves of a head's rotary pairs -> with the pairs side by side."""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def rope_divisors(config: dict[str, Any]) -> Array | None:
    """float32[D / 2] that Llama 3 divides its rotary frequencies by: 1 for short waves, `factor` for long ones, between them a blend."""
    scaling = config.get("rope_scaling")
    if not scaling:
        return None
    assert scaling["rope_type"] == "llama3", f"rope_scaling {scaling['rope_type']!r}: only llama3's is known here"
    half, original = config["head_dim"] // 2, scaling["original_max_position_embeddings"]
    wave = 2 * math.pi * config["rope_theta"] ** (np.arange(half) / half)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    blend = np.clip((original / wave - low) / (high - low), 0, 1)
    return (1 / (blend + (1 - blend) / factor)).astype(np.float32)


def add(writer: gguf.GGUFWriter, name: str, weight: Array) -> None:
    """Matrices keep their bfloat16 bits; norms and routers are float32."""
    if weight.ndim == 1 or "ffn_gate_inp" in name:
        writer.add_tensor(name, (weight.astype(np.uint32) << 16).view(np.float32))
    else:
        raw = np.ascontiguousarray(weight).view(np.uint8)
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    main()
