"""Logits with an adapter are those of the model that PEFT merged it into; with many in a batch, each req's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_core.layers.quant_config import online_quant_config
from tests.adapters.adapted import Adapted
from tests.adapters.peft_adapters import KINDS, TOKENS, save
from tests.models.harness import Row, Stepper, load
from tests.models.tiny import hf_model, reference

BOUND = 1e-4  # of logits whose standard deviation is 1 or more: float32 sums in another order, through every layer
CASES = [("llama3", name) for name in KINDS] + [("qwen3", name) for name in ("whole", "all-linear")]
CASES.append(("qwen3-next", "delta net"))  # rows of its projection lie in another order than the checkpoint's


@pytest.mark.parametrize("case, name", CASES)
def test_merged(case: str, name: str, checkpoints: Path, tmp_path: Path) -> None:
    folder, want = save(case, name, tmp_path)
    adapted = Adapted(reference(case, checkpoints).folder, {name: folder})
    got, base = adapted.logits(TOKENS, name), adapted.logits(TOKENS, None)
    assert float(want.std()) >= 1
    assert float((got - want).abs().max()) < BOUND
    assert float((base - want).abs().max()) > 10 * BOUND


def test_each_of_a_batch_has_its_own(checkpoints: Path, tmp_path: Path) -> None:
    """Four ranks and scalings in one batch, and a req without: prefilled together, then decoded together."""
    names = ["whole", "attention", "rslora", "embeddings"]
    saved = {name: save("llama3", name, tmp_path / name, seed) for seed, name in enumerate(names)}
    adapted = Adapted(reference("llama3", checkpoints).folder, {name: path for name, (path, _) in saved.items()})
    cut = 5
    who: list[str | None] = [names[0], None, names[1], names[2], names[3], names[0]]
    rows = [Row() for _ in who]
    first = adapted.step([(row, TOKENS[:cut], name) for row, name in zip(rows, who, strict=True)])
    then = [[step[-1]] for step in first]
    for token in TOKENS[cut:]:
        for logits, step in zip(
            then, adapted.step([(r, [token], n) for r, n in zip(rows, who, strict=True)]), strict=True
        ):
            logits.append(step[-1])
    for name, start, rest in zip(who, first, then, strict=True):
        got = torch.cat([start, torch.stack(rest[1:])])
        want = saved[name][1] if name else adapted.logits(TOKENS, None)
        assert float((got - want).abs().max()) < BOUND, name


def test_neighbours_without_an_adapter_change_no_bit(checkpoints: Path, tmp_path: Path) -> None:
    folder, _ = save("qwen3", "whole", tmp_path)
    adapted = Adapted(reference("qwen3", checkpoints).folder, {"whole": folder})

    def run(neighbour: str | None) -> torch.Tensor:
        return adapted.step([(Row(), TOKENS, None), (Row(), TOKENS[:4], neighbour)])[0]

    assert torch.equal(run(None), run("whole"))
    plain = Stepper(load(reference("qwen3", checkpoints).folder))
    assert torch.equal(plain.step([(Row(), TOKENS), (Row(), TOKENS[:4])])[0], run("whole"))


def test_a_slot_that_changes_hands_keeps_nothing(checkpoints: Path, tmp_path: Path) -> None:
    """Rank 6 of every module, then rank 1 of two of them, in one slot."""
    large, _ = save("llama3", "rslora", tmp_path / "large")
    small, want = save("llama3", "q and up", tmp_path / "small", 1)
    folder = reference("llama3", checkpoints).folder
    adapted = Adapted(folder, {"large": large, "small": small})
    adapted.slots.write(0, adapted.pairs["small"])
    assert float((adapted.logits(TOKENS, "large") - want).abs().max()) < BOUND
    adapted.slots.write(0, {})
    assert torch.equal(adapted.logits(TOKENS, "large"), adapted.logits(TOKENS, None))


def save_expert_adapter(base: Path, folder: Path) -> tuple[Path, Path]:
    """An adapter with a pair for each expert, by the names that the checkpoint has, and the checkpoint merged by hand."""
    weights = load_file(next(base.glob("*.safetensors")))
    names = [n for n in weights if ".experts." in n or n.endswith(("q_proj.weight", "shared_expert.up_proj.weight"))]
    generator = torch.Generator().manual_seed(0)
    rank, alpha = 3, 4.5
    pairs, merged = {}, dict(weights)
    for name in names[:-1]:  # one matrix has none
        out, width = weights[name].shape
        a, b = torch.randn(rank, width, generator=generator) * 0.1, torch.randn(out, rank, generator=generator) * 0.2
        module = "base_model.model." + name.removesuffix(".weight")
        pairs |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        merged[name] = weights[name] + alpha / rank * (b @ a)
    adapter, whole = folder / "adapter", folder / "merged"
    adapter.mkdir(parents=True)
    save_file(pairs, adapter / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": "all-linear"}
    (adapter / "adapter_config.json").write_text(json.dumps(facts))
    whole.mkdir()
    (whole / "config.json").write_text((base / "config.json").read_text())
    save_file(merged, whole / "model.safetensors")
    return adapter, whole


@pytest.mark.parametrize("case", ["qwen3-moe", "mixtral", "qwen2-moe"])
def test_experts(case: str, checkpoints: Path, tmp_path: Path) -> None:
    base = reference(case, checkpoints).folder
    adapter, whole = save_expert_adapter(base, tmp_path)
    want = Stepper(load(whole)).logits(TOKENS)
    adapted = Adapted(base, {"a": adapter})
    unmerged = adapted.logits(TOKENS, None)
    mixed = adapted.step([(Row(), TOKENS, "a"), (Row(), TOKENS, None)])
    assert float((mixed[0] - want).abs().max()) < BOUND and float((mixed[1] - unmerged).abs().max()) < BOUND
    assert float((unmerged - want).abs().max()) > 10 * BOUND
    with torch.no_grad():
        hf = hf_model(case)(torch.tensor([TOKENS])).logits[0]
    assert float((unmerged - hf).abs().max()) < BOUND  # room for adapters changes nothing


def test_on_a_quantised_base(checkpoints: Path, tmp_path: Path) -> None:
    """The adapter adds to what the quantised layers give."""
    folder, dense_want = save("llama3", "whole", tmp_path)
    base = reference("llama3", checkpoints).folder
    changes = {"quantization": online_quant_config("int8", None)}
    adapted = Adapted(base, {"whole": folder}, changes=changes)
    got, quantised = adapted.logits(TOKENS, "whole"), adapted.logits(TOKENS, None)
    dense_base = Adapted(base, {"whole": folder}).logits(TOKENS, None)
    effect = float((dense_want - dense_base).abs().max())
    assert float((quantised - dense_base).abs().max()) > 10 * BOUND  # it is quantised
    assert float((got - dense_want).abs().max()) < 0.2 * effect  # int8 moves logits by a few hundredths of their size
