"""Adapter files: what is read, and what is refused with the tensor, the value met and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_core.errors import ConfigError, WeightError
from sglang_core.layers.lora import LoraSpec
from sglang_core.weights.adapter import adapter_folder, inspect_adapter, load_adapter, lora_spec
from sglang_core.weights.adapter_config import AdapterConfig
from tests.adapters.adapted import Adapted
from tests.models.tiny import reference

Q = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
RANK, WIDTH = 4, 64


def tensors() -> dict[str, torch.Tensor]:
    return {f"{Q}.lora_A.weight": torch.randn(RANK, WIDTH), f"{Q}.lora_B.weight": torch.randn(64, RANK)}


def write(folder: Path, parts: dict[str, torch.Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors() if parts is None else parts, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    root = tmp_path_factory.mktemp("base")
    spec = LoraSpec(num_slots=2, max_rank=8, targets=frozenset(["q_proj", "down_proj"]))
    return Adapted(reference("llama3", root).folder, {}, spec=spec)


def read(adapted: Adapted, folder: Path) -> Any:
    return load_adapter(inspect_adapter(str(folder)), adapted.model, adapted.slots)


def test_what_is_read(adapted: Adapted, tmp_path: Path) -> None:
    files = inspect_adapter(str(write(tmp_path / "a")))
    assert files.modules == {"q_proj"} and files.max_rank == RANK
    adapter = load_adapter(files, adapted.model, adapted.slots)
    (pair,) = adapter.pairs.values()
    assert pair.a.shape == (RANK, WIDTH) and pair.scale == 2.0 and adapter.nbytes == 4 * (RANK * WIDTH + 64 * RANK)
    assert inspect_adapter(str(tmp_path / "a")).version == files.version
    assert inspect_adapter(str(write(tmp_path / "b"))).version != files.version  # other weights
    write(tmp_path / "a", lora_alpha=9, parts=None)
    assert inspect_adapter(str(tmp_path / "a")).version != files.version


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"r": 0}, "r=0"),
        ({"lora_alpha": "8"}, "lora_alpha='8'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_(": 1}}, "no regular expression"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(WeightError) as error:
        inspect_adapter(str(write(tmp_path / "a", **changes)))
    assert said in str(error.value) and "adapter_config.json" in str(error.value)


def broken(**changes: Any) -> dict[str, torch.Tensor]:
    parts = tensors()
    for name, value in changes.items():
        parts[f"{Q}.lora_{name}.weight"] = value
    return {name: value for name, value in parts.items() if value is not None}


@pytest.mark.parametrize(
    "parts, said",
    [
        (broken(A=torch.randn(RANK, WIDTH + 1)), ["lora_A", "[4, 65]", "[4, 64]"]),
        (broken(B=torch.randn(63, RANK)), ["lora_B", "[63, 4]", "[64, 4]"]),
        (broken(A=torch.randn(5, WIDTH), B=torch.randn(64, 5)), ["lora_A", "[5, 64]", "rank 4"]),
        (broken(A=None), ["has no lora_A"]),
        (broken(B=None), ["has no lora_B"]),
        (broken(A=torch.full((RANK, WIDTH), float("nan"))), ["lora_A", "NaN or infinite"]),
        (broken(A=torch.zeros(RANK, WIDTH, dtype=torch.int32)), ["int32"]),
        (
            {k.replace("q_proj", "o_proj"): v for k, v in tensors().items()},
            ["o_proj takes no adapter", "down_proj, k_proj, q_proj, v_proj"],
        ),
        (
            {k.replace("q_proj", "zz_proj"): v for k, v in tensors().items()},
            ["zz_proj takes no adapter", "--lora-target-modules"],
        ),
        ({k.replace("layers.0", "layers.9"): v for k, v in tensors().items()}, ["layers.9", "takes no adapter"]),
        (
            tensors() | {f"{Q}.lora_magnitude_vector": torch.ones(1)},
            ["lora_magnitude_vector", "no matrix of an adapter"],
        ),
        (
            tensors() | {"base_model.model.model.norm.weight": torch.ones(64)},
            ["model.norm.weight is a whole weight [64]"],
        ),
    ],
)
def test_tensors_that_are_refused(
    parts: dict[str, torch.Tensor], said: list[str], adapted: Adapted, tmp_path: Path
) -> None:
    with pytest.raises(WeightError) as error:
        read(adapted, write(tmp_path / "a", parts))
    assert all(each in str(error.value) for each in said), str(error.value)


def test_more_rank_than_there_is_room_for(adapted: Adapted, tmp_path: Path) -> None:
    parts = {f"{Q}.lora_A.weight": torch.randn(9, WIDTH), f"{Q}.lora_B.weight": torch.randn(64, 9)}
    folder = write(tmp_path / "a", parts, r=9)
    with pytest.raises(WeightError, match="rank 9, and room is kept for 8; start with --max-lora-rank 9"):
        read(adapted, folder)
    with pytest.raises(ConfigError, match="--max-lora-rank 9"):
        lora_spec([inspect_adapter(str(folder))], num_slots=2, max_rank=8, targets=())


def test_a_frozen_embedding_beside_its_adapter_is_left_alone(adapted: Adapted, tmp_path: Path) -> None:
    cfg = adapted.model.cfg
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    same = tensors() | {name: torch.zeros(cfg.vocab_size, cfg.hidden_size)}
    assert len(read(adapted, write(tmp_path / "a", same)).pairs) == 1
    grown = tensors() | {name: torch.zeros(cfg.vocab_size + 2, cfg.hidden_size)}
    with pytest.raises(WeightError, match="new tokens"):
        read(adapted, write(tmp_path / "b", grown))


def test_files_that_are_not_there_or_not_whole(adapted: Adapted, tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(WeightError, match="pickle"):
        inspect_adapter(str(folder))
    (write(tmp_path / "b") / "adapter_model.safetensors").write_bytes(b"12345678" * 4)
    with pytest.raises(WeightError, match="no whole safetensors file"):
        inspect_adapter(str(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    with pytest.raises(WeightError, match=r"adapter_config\.json"):
        inspect_adapter(str(tmp_path / "c"))
    with pytest.raises(ConfigError, match="no folder here"):
        adapter_folder(str(tmp_path / "d"))
    with pytest.raises(ConfigError, match="demo adapters are"):
        adapter_folder("demo:nothing")
    with pytest.raises(WeightError, match="no LoRA matrices"):
        inspect_adapter(str(write(tmp_path / "e", {"x": torch.ones(1)})))


def test_room_comes_from_settings_or_from_the_adapters(tmp_path: Path) -> None:
    files = inspect_adapter(str(write(tmp_path / "a")))
    assert lora_spec([files], num_slots=3, max_rank=None, targets=()).max_rank == RANK
    asked = lora_spec([], num_slots=3, max_rank=16, targets=("all", "lm_head"))
    assert (
        asked.covers("model.layers.3.mlp.down_proj")
        and asked.covers("lm_head")
        and not asked.covers("model.embed_tokens")
    )
    with pytest.raises(ConfigError, match="--max-lora-rank and --lora-target-modules"):
        lora_spec([], num_slots=3, max_rank=16, targets=())


def test_patterns_are_matched_as_peft_matches_them() -> None:
    raw = CONFIG | {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "k_proj": 3}, "alpha_pattern": {"q_proj": 6}}
    config = AdapterConfig.parse(raw, "x")
    assert (
        config.rank_of("model.layers.1.self_attn.q_proj") == 2
        and config.rank_of("model.layers.11.self_attn.q_proj") == 4
    )
    assert config.scale_of("model.layers.1.self_attn.q_proj") == 3.0 and config.scale_of("a.k_proj") == 8 / 3
    stabilized = AdapterConfig.parse(raw | {"use_rslora": True}, "x")
    assert stabilized.scale_of("model.v_proj") == 8 / 2
