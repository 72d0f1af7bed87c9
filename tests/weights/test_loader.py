from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sglang_core.backend.communicator import LocalCommunicator
from sglang_core.errors import ConfigError, WeightError
from sglang_core.layers.build import BuildContext, WeightSpec, bind_model
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.models.registry import create_model
from sglang_core.weights.dummy import CHUNK, dummy_part
from sglang_core.weights.loader import Wants, count_weight_bytes, load_model
from tests.models.harness import Stepper, build_context

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,
    "max_position_embeddings": 64,
    "attention_bias": True,
}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


class Ranked(LocalCommunicator):
    """Says that it is one of several ranks; never called."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def bound(ctx: BuildContext | None = None, **changes: object) -> CausalLM:
    model = create_model(CONFIG | changes)
    bind_model(model, ctx or build_context())
    return model


def checkpoint(folder: Path, edit: Callable[[dict[str, Tensor]], object] = lambda t: None, **changes: object) -> Path:
    tensors = {
        spec.name: torch.cat(dummy_part(spec, 0), dim=spec.dim).contiguous()
        for spec in Wants(bound(**changes)).distinct()
    }
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> CausalLM:
    return load_model(create_model(CONFIG | changes), folder, build_context(dtype=dtype), progress=False)


def logits(model: CausalLM) -> Tensor:
    return Stepper(model).logits(TOKENS)


def test_on_the_meta_device_dummy_weights_are_shapes() -> None:
    """How a step of a model of any size is traced, or compiled for a device that is not here."""
    ctx = replace(build_context(), device=torch.device("meta"))
    model = load_model(create_model(CONFIG), "", ctx, load_format="dummy", progress=False)
    held = {name: x for name, x in model.named_buffers() if x is not None}
    real = dict(load_model(create_model(CONFIG), "", build_context(), load_format="dummy").named_buffers())
    assert {x.device.type for x in held.values()} == {"meta"}
    assert {name: (x.shape, x.dtype) for name, x in held.items()} == {
        name: (x.shape, x.dtype) for name, x in real.items()
    }


def test_shapes_of_a_quantised_model_are_dummy_weights_and_values_are_not() -> None:
    """Codes have no values that could be drawn."""
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    quantised = CONFIG | {"hidden_size": 512, "intermediate_size": 256, "quantization_config": fp8}
    on_meta = replace(build_context(), device=torch.device("meta"))
    model = load_model(create_model(quantised), "", on_meta, load_format="dummy", progress=False)
    codes = [x for x in model.buffers() if x.dtype == torch.float8_e4m3fn]
    assert len(codes) == 4 * CONFIG["num_hidden_layers"] and all(x.is_meta for x in codes)
    with pytest.raises(ConfigError, match="draws floats"):
        load_model(create_model(quantised), "", build_context(), load_format="dummy", progress=False)


def test_a_saved_dummy_is_the_dummy(tmp_path: Path) -> None:
    dummy = load_model(create_model(CONFIG), "", build_context(), load_format="dummy")
    assert torch.equal(logits(loaded(checkpoint(tmp_path))), logits(dummy))
    other = load_model(create_model(CONFIG), "", build_context(), load_format="dummy", seed=1)
    assert float((logits(other) - logits(dummy)).abs().max()) > 0.1


def test_mismatches_are_named_and_counted(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if ".1.mlp" in n or "q_proj.bias" in n or "input_layernorm" in n]:
            del tensors[name]
        tensors["model.layers.0.self_attn.extra.weight"] = torch.ones(2)
        tensors["model.norm.weight"] = torch.ones(33)
        tensors["lm_head.weight"] = torch.ones(37, 32, dtype=torch.int8)

    with pytest.raises(WeightError) as raised:
        loaded(checkpoint(tmp_path, edit))
    message = str(raised.value)
    assert "7 missing (" in message and ", ...)" in message and "model.layers.1.mlp.gate_proj.weight" in message
    assert "1 unexpected (model.layers.0.self_attn.extra.weight)" in message
    assert "model.norm.weight is [33], not [32]" in message
    assert "lm_head.weight is I8, not a float" in message


def test_what_old_checkpoints_save_beside_weights_is_ignored(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    loaded(checkpoint(tmp_path, edit))


def test_tied_embeddings_with_and_without_a_head_in_the_file(tmp_path: Path) -> None:
    without = tmp_path / "without"
    without.mkdir()
    model = loaded(checkpoint(without, tie_word_embeddings=True), tie_word_embeddings=True)
    assert model.lm_head.weight["weight"].data_ptr() == model.model.embed_tokens.weight.data_ptr()
    expected = logits(model)
    assert count_weight_bytes(bound()) - count_weight_bytes(bound(tie_word_embeddings=True)) == 37 * 32 * 4

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = torch.full((37, 32), 7.0)

    folder = checkpoint(tmp_path, edit, tie_word_embeddings=True)
    assert torch.equal(logits(loaded(folder, tie_word_embeddings=True)), expected)
    with pytest.raises(WeightError, match=r"1 missing \(lm_head.weight\)"):
        loaded(without, tie_word_embeddings=False)


GEMMA = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 8, "attention_bias": False}


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_vision_language_checkpoint(prefix: str, tmp_path: Path) -> None:
    """Both names that transformers has given it; the vision tower stays in the file."""
    plain, nested = tmp_path / "plain", tmp_path / "nested"
    plain.mkdir()
    nested.mkdir()
    expected = logits(loaded(checkpoint(plain, **GEMMA), **GEMMA))

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.removeprefix("model.")] = tensors.pop(name)
        tensors["vision_tower.encoder.weight"] = torch.ones(2)
        tensors["model.multi_modal_projector.weight"] = torch.ones(2)

    folder = checkpoint(nested, edit, **GEMMA)
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": CONFIG | GEMMA}
    model = load_model(create_model(config), folder, build_context(), progress=False)
    assert torch.equal(logits(model), expected)


def test_a_tensor_that_comes_twice_is_unexpected(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["language_model.model.norm.weight"] = tensors["model.norm.weight"].clone()

    folder = checkpoint(tmp_path, edit, **GEMMA)
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": CONFIG | GEMMA}
    with pytest.raises(WeightError, match=r"1 unexpected \((language_model.)?model.norm.weight\)"):
        load_model(create_model(config), folder, build_context(), progress=False)


def test_weights_take_the_dtype_asked_for_and_leave_the_file(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    model = loaded(folder, torch.bfloat16)
    assert {b.dtype for n, b in model.named_buffers() if "table" not in n} == {torch.bfloat16}
    before = logits(model)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"\xff" * file.stat().st_size)  # in place: a mapped tensor would change
    assert torch.equal(logits(model), before)


def test_bytes_counted_from_shapes_are_the_bytes_loaded(tmp_path: Path) -> None:
    model = loaded(checkpoint(tmp_path))
    held = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if not n.endswith("table"))
    assert count_weight_bytes(model) == held
    ranks = [count_weight_bytes(bound(build_context(tp=Ranked(rank, 2)))) for rank in range(2)]
    assert max(ranks) < 0.6 * held < sum(ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_parts_of_all_ranks_cover_each_tensor(ranks: int) -> None:
    whole = {s.name: s.shape for s in Wants(bound()).distinct()}
    seen = {name: torch.zeros(shape) for name, shape in whole.items()}
    for rank in range(ranks):
        for spec in Wants(bound(build_context(tp=Ranked(rank, ranks)))).distinct():
            assert spec.shape == whole[spec.name]
            for start, stop in spec.ranges or ((0, spec.shape[spec.dim]),):
                seen[spec.name].narrow(spec.dim, start, stop - start).add_(1)
    for name, count in seen.items():
        shared = 2 if ranks == 4 and ("k_proj" in name or "v_proj" in name) else 1  # 2 KV heads over 4 ranks
        everywhere = "norm" in name or name.endswith("o_proj.bias")
        assert torch.equal(count, torch.full_like(count, float(ranks if everywhere else shared))), name


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_attention_heads=4.*tp_size=3; set --tp-size to one of 1, 2, 4"):
        bound(build_context(tp=Ranked(0, 3)))
    with pytest.raises(ConfigError, match=r"intermediate_size=50 cannot be divided over tp_size=4"):
        bound(build_context(tp=Ranked(0, 4)), intermediate_size=50)


@dataclass(frozen=True)
class Part:
    dim: int
    ranges: tuple[tuple[int, int], ...]


@pytest.mark.parametrize("part", [Part(0, ((3, 9),)), Part(0, ((0, 2), (20, 21))), Part(1, ((5, 7),))])
def test_a_part_of_random_weights_is_cut_from_the_whole(part: Part) -> None:
    shape = (24, CHUNK // 8)  # eight rows a chunk
    whole = dummy_part(WeightSpec(name="w", shape=shape, dtype=torch.float32, scale=0.5), 7)[0]
    cut = dummy_part(
        WeightSpec(name="w", shape=shape, dtype=torch.float32, dim=part.dim, ranges=part.ranges, scale=0.5), 7
    )
    for piece, (start, stop) in zip(cut, part.ranges, strict=True):
        assert torch.equal(piece, whole.narrow(part.dim, start, stop - start))
    assert abs(float(whole.std()) - 0.5) < 0.01
    assert float((whole[:8] - whole[8:16]).abs().max()) > 0.1
