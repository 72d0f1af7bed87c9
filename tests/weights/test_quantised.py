"""Quantised checkpoints, written as their published formats say, against the dequantised model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sglang_core.errors import ConfigError, WeightError
from sglang_core.layers.build import bind_model
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.linear import Linear
from sglang_core.layers.quant_config import read_quant_config
from sglang_core.layers.stored import DENSE
from sglang_core.models.registry import create_model
from sglang_core.ops import quant
from sglang_core.ops.formats import Fmt
from sglang_core.ops.weight import PackedWeight
from sglang_core.weights.dummy import dummy_part
from sglang_core.weights.loader import Wants, load_model
from tests.models.harness import Stepper, build_context
from tests.weights.test_loader import Ranked

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 37,
    "max_position_embeddings": 64,
}
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
Save = Callable[[str, PackedWeight], dict[str, Tensor]]


def words(codes: Tensor) -> Tensor:
    """codes: [a, 8b] -> int32[a, b], the first of eight in the lowest nibble."""
    shifted = codes.long().reshape(codes.shape[0], -1, 8) << torch.arange(0, 32, 4)
    total = shifted.sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def awq(codes: Tensor) -> Tensor:
    """AutoAWQ packs columns 0, 2, 4, 6, 1, 3, 5, 7 of every eight, in this order."""
    return words(codes.reshape(codes.shape[0], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1))


def save_awq(name: str, w: PackedWeight) -> dict[str, Tensor]:
    codes, zero = quant.unpack4(w["weight"]).t(), w["zero"].t()
    return {"qweight": awq(codes), "qzeros": awq(zero), "scales": w["scale"].t()}


def save_gptq(v2: bool) -> Save:
    def save(name: str, w: PackedWeight) -> dict[str, Tensor]:
        codes, zero = quant.unpack4(w["weight"]), w["zero"].t().int() - (0 if v2 else 1)
        group = w["group"] if "group" in dict(w.named_buffers()) else torch.arange(w.in_features).int() // 64
        return {"qweight": words(codes).t(), "qzeros": words(zero), "scales": w["scale"].t(), "g_idx": group}

    return save


def save_pack(name: str, w: PackedWeight) -> dict[str, Tensor]:
    shape = torch.tensor([w.out_features, w.in_features])
    codes = words(quant.unpack4(w["weight"]))
    return {"weight_packed": codes, "weight_scale": w["scale"], "weight_shape": shape}


def save_block(name: str, w: PackedWeight) -> dict[str, Tensor]:
    return {"weight": w["weight"], "weight_scale_inv": w["scale"]}


def save_channel(name: str, w: PackedWeight) -> dict[str, Tensor]:
    return {"weight": w["weight"], "weight_scale": w["scale"][:, None]}


def save_tensor(name: str, w: PackedWeight) -> dict[str, Tensor]:
    one = {"weight": w["weight"], "weight_scale": w["scale"][0].clone()}
    return one | ({"input_scale": w["x_scale"][0].clone()} if Fmt.parse(w.fmt).static else {})


def save_ct_nvfp4(name: str, w: PackedWeight) -> dict[str, Tensor]:
    made = {"weight_packed": w["weight"], "weight_scale": w["scale"], "weight_global_scale": 1 / w["global_scale"][:1]}
    return made | ({"input_global_scale": 1 / w["x_scale"]} if Fmt.parse(w.fmt).static else {})


def save_modelopt_nvfp4(name: str, w: PackedWeight) -> dict[str, Tensor]:
    one = {"weight": w["weight"], "weight_scale": w["scale"], "weight_scale_2": w["global_scale"][0].clone()}
    return one | {"input_scale": w["x_scale"][0].clone()}


def ct(weights: dict[str, Any], x: dict[str, Any] | None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True} | weights, "input_activations": x}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


def gptq(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False} | changes


W8, F8 = {"num_bits": 8, "type": "int"}, {"num_bits": 8, "type": "float"}
TOKEN = {"strategy": "token", "dynamic": True, "symmetric": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
W4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
KINDS: dict[str, tuple[str, dict[str, Any], Save]] = {
    "awq": ("int4.awq.g64", AWQ, save_awq),
    "gptq": ("int4.gptq.g64", gptq(), save_gptq(False)),
    "awq, one group": ("int4.awq.g-1", AWQ | {"group_size": -1}, save_awq),
    "gptq, small groups": ("int4.gptq.g32", gptq(group_size=32), save_gptq(False)),
    "ct pack, one group": ("int4.pack.g-1", ct({**W4, "strategy": "channel", "group_size": None}, None), save_pack),
    "gptq v2": ("int4.gptq.g64", gptq(checkpoint_format="gptq_v2"), save_gptq(True)),
    "gptq desc_act": ("int4.gptq.g64.act_order", gptq(desc_act=True), save_gptq(False)),
    "fp8 block": ("fp8.block128", BLOCK, save_block),
    "fp8": ("fp8.tensor", {"quant_method": "fp8", "activation_scheme": "dynamic"}, save_tensor),
    "fp8 static": ("fp8.tensor.static", {"quant_method": "fp8", "activation_scheme": "static"}, save_tensor),
    "modelopt fp8": ("fp8.tensor.static", {"quant_method": "modelopt", "quant_algo": "FP8"}, save_tensor),
    "ct int8": ("int8.token_channel", ct({**W8, "strategy": "channel"}, W8 | TOKEN), save_channel),
    "ct int8 asym": (
        "int8.token_channel.asym",
        ct({**W8, "strategy": "channel"}, W8 | TOKEN | {"symmetric": False}),
        save_channel,
    ),
    "ct fp8": ("fp8.token_channel", ct({**F8, "strategy": "channel"}, F8 | TOKEN), save_channel),
    "ct w4a8": ("w4a8_fp8.g64", ct(W4, F8 | TOKEN), save_pack),
    "ct pack": ("int4.pack.g64", ct(W4, None), save_pack),
    "ct nvfp4": ("nvfp4.g16.static", ct(FP4, FP4), save_ct_nvfp4),
    "ct nvfp4 a16": ("nvfp4.g16.a16", ct(FP4, None), save_ct_nvfp4),
    "modelopt nvfp4": ("nvfp4.g16.static", {"quant_method": "modelopt", "quant_algo": "NVFP4"}, save_modelopt_nvfp4),
}


def write(
    folder: Path,
    kind: str,
    edit: Callable[[dict[str, Tensor]], object] = lambda t: None,
    config: dict[str, Any] = CONFIG,
    quantised: str | tuple[str, ...] = "_proj.weight",
) -> dict[str, Any]:
    """A random model with its matrices named `*quantised` in the format of `kind`. Gives its dequantised tensors."""
    fmt, quantization, save = KINDS[kind]
    model = create_model(config)
    bind_model(model, build_context())
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    for spec in Wants(model).distinct():
        plain[spec.name] = torch.cat(dummy_part(spec, 0), dim=spec.dim).contiguous()
        if not spec.name.endswith(quantised):
            stored[spec.name] = plain[spec.name]
            continue
        x_scale = torch.tensor([0.0625]) if Fmt.parse(fmt).static else None
        w = quant.quantize(plain[spec.name], fmt, x_scale=x_scale)
        if "zero" in dict(w.named_buffers()):
            w["zero"].clamp_(min=1)  # version 1 stores it less one
        if "group" in dict(w.named_buffers()):
            w["group"].copy_(w["group"][order])
        if "global_scale" in dict(w.named_buffers()):  # a power of two has an exact reciprocal
            w["global_scale"].copy_(torch.exp2(w["global_scale"].log2().round()))
        plain[spec.name] = quant.dequantize(w)
        at = spec.name.removesuffix(".weight")
        stored |= {f"{at}.{k}": t.contiguous() for k, t in save(at, w).items()}
    edit(stored)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return plain


def load(folder: Path, **context: Any) -> CausalLM:
    config = json.loads((folder / "config.json").read_text())
    return load_model(create_model(config), folder, build_context(**context), progress=False)


def load_plain(tensors: dict[str, Tensor], folder: Path, config: dict[str, Any] = CONFIG) -> CausalLM:
    """A checkpoint that is not quantised, of these tensors."""
    plain = folder / "plain"
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config))
    return load(plain)


def logit_bound(fmt: Fmt) -> float:
    """Of the largest logit. Weights are equal: what differs is activations of 4, 8 and 2 significant bits."""
    return 1e-4 if fmt.activation == "as_is" else {"fp8": 0.12, "int8": 0.05, "int4": 0.12, "e2m1": 0.3}[fmt.element]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_dequantised_model(kind: str, tmp_path: Path) -> None:
    plain = write(tmp_path, kind)
    model = load(tmp_path)
    fmt = Fmt.parse(KINDS[kind][0])
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    assert {m.weight.fmt for m in linears.values()} == {fmt.name}
    for name, m in linears.items():
        parent = name.rpartition(".")[0]
        names = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
        parts = names.get(name.rpartition(".")[2], [name.rpartition(".")[2]])
        assert torch.equal(quant.dequantize(m.weight), torch.cat([plain[f"{parent}.{p}.weight"] for p in parts]))
    theirs, ours = Stepper(load_plain(plain, tmp_path)).logits(TOKENS), Stepper(model).logits(TOKENS)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < logit_bound(fmt)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_slices_of_the_same_matrices(kind: str, tmp_path: Path) -> None:
    write(tmp_path, kind)
    if kind == "fp8 block":  # a rank's 64 rows of K share their block with the other's
        with pytest.raises(ConfigError, match="shares a scale"):
            load(tmp_path, tp=Ranked(0, 2))
        return
    whole, ranks = load(tmp_path), [load(tmp_path, tp=Ranked(r, 2)) for r in range(2)]
    layer, parts = whole.model.layers[0], [m.model.layers[0] for m in ranks]
    for get in (lambda m: m.self_attn.o_proj, lambda m: m.mlp.down_proj):
        columns = [quant.dequantize(get(p).weight) for p in parts]
        assert torch.equal(torch.cat(columns, dim=1), quant.dequantize(get(layer).weight))
    gate_up = [quant.dequantize(p.mlp.gate_up_proj.weight).chunk(2) for p in parts]
    rows = torch.cat([gate for gate, _ in gate_up] + [up for _, up in gate_up])
    assert torch.equal(rows, quant.dequantize(layer.mlp.gate_up_proj.weight))


def test_a_group_is_not_cut(tmp_path: Path) -> None:
    write(tmp_path, "awq")
    config = CONFIG | {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32, "intermediate_size": 512}
    model = create_model(config | {"quantization_config": AWQ})
    with pytest.raises(ConfigError, match="set --tp-size to a smaller divisor"):
        bind_model(model, build_context(tp=Ranked(0, 8)))


def test_wrong_tensors_are_named(tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        at = "model.layers.0.self_attn"
        del tensors[f"{at}.q_proj.weight_scale_inv"]
        tensors[f"{at}.o_proj.weight"] = torch.ones(256, 256)

    write(tmp_path, "fp8 block", edit)
    with pytest.raises(WeightError, match=r"q_proj.weight_scale_inv.*o_proj.weight is F32, not float8_e4m3fn"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        (AWQ | {"version": "gemv"}, "version='gemv'"),
        (AWQ | {"bits": 8}, "bits=8"),
        (gptq(group_size=16), "group_size=16"),
        (gptq(dynamic={"+:x": {}}), "dynamic="),
        ({"quant_method": "fp8"}, "activation_scheme=None"),
        (BLOCK | {"weight_block_size": [64, 64]}, "weight_block_size"),
        (ct(W4, W8 | TOKEN), "weights="),
        (ct(W4 | {"symmetric": False}, None), "symmetric"),
        (ct(W4 | {"actorder": "group"}, None), "actorder"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "quant_algo"),
    ],
)
def test_other_schemes_are_refused(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=r"is quantised .* not supported: .*Known are fp8") as raised:
        read_quant_config(changes)
    assert found in str(raised.value)


def test_ignored_layers_are_dense() -> None:
    c = read_quant_config(ct(W4, None) | {"ignore": ["lm_head", "re:.*gate$", "model.layers.0.*", "q_proj"]})
    names = ("lm_head", "model.layers.9.mlp.gate", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj")
    assert all(c.layer(n) is DENSE for n in names)
    stored = c.rules[0].stored
    assert c.layer("model.layers.1.mlp.up_proj") is stored and c.layer("model.layers.1.mlp.gate_proj") is stored
