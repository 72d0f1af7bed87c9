"""Adapters as PEFT writes them, with random weights, and the logits of the models that PEFT merged them into."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

from tests.models.tiny import hf_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
DELTA_NET = ["in_proj_qkvz", "in_proj_ba", "out_proj"]
TOKENS = [5, 9, 77, 31, 2, 64, 11, 40, 18]


@dataclass(frozen=True)
class Kind:
    """How an adapter is configured; `changes` are PEFT's names."""

    rank: int = 4
    targets: Any = field(default_factory=lambda: ATTENTION + MLP)
    changes: dict[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "whole": Kind(),
    "attention": Kind(rank=7, targets=ATTENTION, changes={"lora_alpha": 16}),
    "q and up": Kind(rank=1, targets=["q_proj", "up_proj"]),
    "rslora": Kind(rank=6, changes={"use_rslora": True, "lora_alpha": 5}),
    "patterns": Kind(
        changes={
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
            "alpha_pattern": {"v_proj": 1.5, "up_proj": 20},
        }
    ),
    "all-linear": Kind(targets="all-linear"),
    "regex": Kind(targets=r".*layers\.1\..*(v|down)_proj"),
    "embeddings": Kind(rank=5, targets=["embed_tokens", "lm_head", "q_proj"]),
    "one layer": Kind(changes={"layers_to_transform": [0]}),
}
KINDS_OF_NETS: dict[str, Kind] = {"delta net": Kind(rank=3, targets=DELTA_NET)}


def peft_model(base: torch.nn.Module, kind: Kind, seed: int) -> peft.PeftModel:
    config = peft.LoraConfig(
        r=kind.rank,
        **({"lora_alpha": 2 * kind.rank} | kind.changes),
        target_modules=kind.targets,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:  # B begins as zeros, which would hide a missing A
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4 / max(p.shape) ** 0.5)
    return model.eval()


def save(case: str, name: str, folder: Path, seed: int = 0) -> tuple[Path, Tensor]:
    """The adapter `name` of the tiny model `case`, on disk, and the logits of TOKENS of the two merged."""
    model = peft_model(hf_model(case), (KINDS | KINDS_OF_NETS)[name], seed)
    model.save_pretrained(folder)
    merged = model.merge_and_unload()
    with torch.no_grad():
        return folder, merged(torch.tensor([TOKENS])).logits[0].float()
