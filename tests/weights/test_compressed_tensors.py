"""Checkpoints that the format's own library writes, against the weights that it makes of them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor, nn

from sglang_core.layers.linear import Linear
from sglang_core.ops import quant
from sglang_core.ops.formats import Fmt
from tests.models.harness import Stepper
from tests.models.tiny import randomize
from tests.weights.test_quantised import CONFIG, TOKENS, load, load_plain, logit_bound

SCHEMES = {
    "W8A8": "int8.token_channel",
    "FP8": "fp8.tensor.static",
    "FP8_DYNAMIC": "fp8.token_channel",
    "FP8_BLOCK": "fp8.block128",
    "W4A16": "int4.pack.g128",
    "W4AFP8": "w4a8_fp8.g128",
    "NVFP4": "nvfp4.g16.static",
    "NVFP4A16": "nvfp4.g16.a16",
}


def compressed(scheme: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Quantise a small Llama to nearest and save it. Gives the tensors of the decompressed model, and its config."""
    sizes = {k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, dtype="float32")).eval()
    randomize(model)
    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(scheme, ["Linear"])}, ignore=["lm_head"]
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "weight_scale"):
            calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    names = {n for n in model.state_dict() if not n.endswith(("scale", "zero_point", "shape", "g_idx"))}
    plain = {n: t.detach().float().contiguous() for n, t in model.state_dict().items() if n in names}
    return plain, {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if "quant" not in k}


def calibrate(module: Any) -> None:
    """Scales of the weight from its largest values, as a calibration would set them; those of inputs at a guess."""
    args, w = module.quantization_scheme.weights, module.weight.data
    total = None
    if hasattr(module, "weight_global_scale"):
        total = generate_gparam(w.min(), w.max())
        module.weight_global_scale.data.copy_(total)
    rows, columns = w.shape
    match args.strategy:
        case "channel":
            parts = w[:, None]
        case "tensor":
            parts = w.reshape(1, 1, -1)
        case "block":
            parts = w.unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).transpose(1, 2).flatten(2)
        case _:
            parts = w.reshape(rows, columns // args.group_size, args.group_size)
    scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), args, total)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "input_scale"):
        module.input_scale.data.fill_(0.0625)
    if hasattr(module, "input_global_scale"):
        module.input_global_scale.data.fill_(64.0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_those_that_the_library_decompresses(scheme: str, tmp_path: Path) -> None:
    plain, config = compressed(scheme, tmp_path)
    model = load(tmp_path)
    merged = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    fmt = Fmt.parse(SCHEMES[scheme])
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear)}
    assert {m.weight.fmt for m in linears.values()} == {fmt.name}
    for name, module in linears.items():
        parent, _, own = name.rpartition(".")
        theirs = torch.cat([plain[f"{parent}.{part}.weight"] for part in merged.get(own, [own])])
        close = {"rtol": 2**-7, "atol": 1e-7} if fmt.element == "e2m1" else {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(quant.dequantize(module.weight), theirs, **close)  # its nvfp4 is rounded to bfloat16
    theirs = Stepper(load_plain(plain, tmp_path, config)).logits(TOKENS)
    ours = Stepper(model).logits(TOKENS)
    assert float(theirs.std()) >= 1
    bound = 0.03 if fmt.name == "nvfp4.g16.a16" else 2 * logit_bound(fmt)  # scores are sharper than of our own writer's
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < bound
