"""Quantised experts: a checkpoint of three matrices an expert in every layout, and GPT-OSS's stacks in mxfp4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_core.errors import ConfigError
from sglang_core.layers.build import bind_model
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.experts import Experts
from sglang_core.models.registry import create_model
from sglang_core.ops import quant
from sglang_core.ops.formats import Fmt
from sglang_core.weights.loader import count_weight_bytes
from tests.models.harness import Stepper, build_context
from tests.models.tiny import reference
from tests.weights.test_loader import Ranked
from tests.weights.test_quantised import CONFIG, KINDS, TOKENS, load, load_plain, logit_bound, write

MOE = CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
}
EXPERTS = tuple(f"experts.{i}.{name}_proj.weight" for i in range(3) for name in ("gate", "up", "down"))


def experts_of(model: CausalLM) -> Experts:
    return next(m for m in model.modules() if isinstance(m, Experts))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantised_model(kind: str, tmp_path: Path) -> None:
    plain = write(tmp_path, kind, config=MOE)
    model, fmt = load(tmp_path), Fmt.parse(KINDS[kind][0])
    layer = experts_of(model)
    assert layer.w13.fmt == layer.w2.fmt == fmt.name
    w13, w2 = quant.dequantize(layer.w13), quant.dequantize(layer.w2)
    for i in range(3):
        gate, up, down = (plain[f"model.layers.0.mlp.experts.{i}.{n}_proj.weight"] for n in ("gate", "up", "down"))
        assert torch.equal(w13[i], torch.cat([gate, up]))
        assert torch.equal(w2[i], down)
    ours, theirs = Stepper(model).logits(TOKENS), Stepper(load_plain(plain, tmp_path, MOE)).logits(TOKENS)
    # A token whose second and third expert score alike may visit another once its activations are rounded.
    differ = (ours - theirs).abs().amax(-1) / theirs.abs().max()
    assert float(differ.quantile(0.75)) < logit_bound(fmt)
    assert fmt.activation != "as_is" or float(differ.max()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_shares_of_every_expert(kind: str, tmp_path: Path) -> None:
    config = MOE | {"num_attention_heads": 4, "num_key_value_heads": 4}
    write(tmp_path, kind, config=config, quantised=EXPERTS)
    only_experts = KINDS[kind][1] | {key: ["self_attn"] for key in ("ignore", "modules_to_not_convert")}
    if kind.startswith("gptq"):  # it has no list of what is left out
        only_experts = KINDS[kind][1]
        write(tmp_path, kind, config=config)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": only_experts}))
    whole = experts_of(load(tmp_path))
    ranks = [experts_of(load(tmp_path, tp=Ranked(r, 2))) for r in range(2)]
    assert [layer.width for layer in ranks] == [128, 128]
    w13, w2 = quant.dequantize(whole.w13), quant.dequantize(whole.w2)
    halves = [quant.dequantize(layer.w13).chunk(2, dim=1) for layer in ranks]
    assert torch.equal(torch.cat([g for g, _ in halves] + [u for _, u in halves], dim=1), w13)
    assert torch.equal(torch.cat([quant.dequantize(layer.w2) for layer in ranks], dim=2), w2)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_whole_experts(kind: str, tmp_path: Path) -> None:
    write(tmp_path, kind, config=MOE | {"num_experts": 4, "num_key_value_heads": 4})
    whole = experts_of(load(tmp_path))
    ranks = [experts_of(load(tmp_path, tp=Ranked(r, 2), ep_size=2)) for r in range(2)]
    assert [layer.width for layer in ranks] == [256, 256]
    for name in ("w13", "w2"):
        parts = [quant.dequantize(getattr(layer, name)) for layer in ranks]
        assert torch.equal(torch.cat(parts), quant.dequantize(getattr(whole, name)))


def test_bytes_are_those_that_ranks_hold(tmp_path: Path) -> None:
    for kind in KINDS:
        folder = tmp_path / kind.replace(" ", "-")
        folder.mkdir()
        config = MOE | {"num_key_value_heads": 4, "vocab_size": 38}
        write(folder, kind, config=config)
        for rank in range(2):
            tp = Ranked(rank, 2)
            model = create_model(json.loads((folder / "config.json").read_text()))
            bind_model(model, build_context(tp=tp))
            counted = count_weight_bytes(model)
            held = {b.data_ptr(): b.nbytes for n, b in load(folder, tp=tp).named_buffers() if "rotary" not in n}
            assert counted == sum(held.values()), kind


def test_experts_that_are_stored_unlike_are_refused() -> None:
    quantization = KINDS["ct fp8"][1] | {"ignore": ["model.layers.0.mlp.experts.1.up_proj"]}
    with pytest.raises(ConfigError, match=r"experts are stored unlike \(dense, fp8.token_channel\)"):
        bind_model(create_model(MOE | {"quantization_config": quantization}), build_context())


def test_a_router_is_dense_whatever_is_said_of_linear_layers(tmp_path: Path) -> None:
    write(tmp_path, "gptq", config=MOE)
    gate = load(tmp_path).get_submodule("model.layers.0.mlp.gate")
    assert gate.weight.fmt == "dense"


def mxfp4(folder: Path, source: Path) -> dict[str, Tensor]:
    """GPT-OSS's published layout, of a checkpoint in floats. Gives the dequantised tensors in that one's layout."""
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        plain[name] = tensor
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = tensor
            continue
        packed = quant.quantize(tensor.mT, "mxfp4.g32")  # files of floats have [in, out], those of mxfp4 [out, in]
        stored[f"{name}_blocks"] = packed["weight"].unflatten(-1, (-1, 16))
        stored[f"{name}_scales"] = packed["scale"]
        plain[name] = quant.dequantize(packed).mT.contiguous()
    save_file({name: t.contiguous() for name, t in stored.items()}, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return plain


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gpt_oss")
    source = reference("gpt-oss", folder).folder
    packed = folder / "mxfp4"
    packed.mkdir()
    return packed, mxfp4(packed, source), json.loads((source / "config.json").read_text())


def test_gpt_oss_in_mxfp4_gives_the_logits_of_the_dequantised_model(gpt_oss: Any, tmp_path: Path) -> None:
    folder, plain, config = gpt_oss
    model = load(folder)
    assert experts_of(model).w13.fmt == "mxfp4.g32"
    theirs, ours = Stepper(load_plain(plain, tmp_path, config)).logits(TOKENS), Stepper(model).logits(TOKENS)
    assert float(theirs.std()) >= 1
    assert float((ours - theirs).abs().max()) < 1e-4
    rough = load_file(reference("gpt-oss", folder.parent).folder / "model.safetensors")
    before = tmp_path / "before"
    before.mkdir()
    assert float((Stepper(load_plain(rough, before, config)).logits(TOKENS) - ours).abs().max()) > 1e-2


def test_ranks_of_gpt_oss_cut_between_groups(gpt_oss: Any) -> None:
    folder, _, _ = gpt_oss
    whole = experts_of(load(folder))
    ranks = [experts_of(load(folder, tp=Ranked(r, 2))) for r in range(2)]
    assert [layer.width for layer in ranks] == [64, 32]  # of 96, in groups of 32
    h, weights = torch.randn(4, 64), torch.rand(4, 2)
    ids = torch.tensor([[0, 3], [1, 2], [3, 1], [4, 0]], dtype=torch.int32)
    total = sum(layer(h, weights, ids) for layer in ranks)
    torch.testing.assert_close(total, whole(h, weights, ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="has 3 parts of 32 that share a scale, too few for tp_size=4"):
        load(folder, tp=Ranked(0, 4))


@pytest.mark.parametrize("stored", ["mxfp4", "floats"])
def test_ranks_of_gpt_oss_hold_whole_experts(gpt_oss: Any, stored: str) -> None:
    packed, _, _ = gpt_oss
    folder = packed if stored == "mxfp4" else reference("gpt-oss", packed.parent).folder
    whole = experts_of(load(folder))
    h, weights = torch.randn(4, 64), torch.rand(4, 2)
    ids = torch.tensor([[0, 3], [1, 2], [3, 1], [4, 0]], dtype=torch.int32)
    ranks = [experts_of(load(folder, tp=Ranked(r, 4), ep_size=2)) for r in range(4)]  # each expert is shared by two
    assert [layer.width for layer in ranks] == ([64, 32] if stored == "mxfp4" else [48, 48]) * 2
    total = sum(layer(h, weights, ids) for layer in ranks)
    torch.testing.assert_close(total, whole(h, weights, ids), rtol=1e-4, atol=1e-4)


def test_stacks_in_other_formats_are_refused(gpt_oss: Any) -> None:
    _, _, config = gpt_oss
    model = create_model(config | {"quantization_config": KINDS["ct fp8"][1]})
    with pytest.raises(ConfigError, match=r"stored in fp8.token_channel; stacked experts are read in mxfp4"):
        bind_model(model, build_context())
