"""Norms and activations hand codes to linear layers that take them, to no others, and nothing of a result changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.selection import OpTable
from sglang_core.layers.build import BuildContext, bind_model
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.lora import LoraSpec
from sglang_core.layers.quant_config import online_quant_config
from sglang_core.models.registry import create_model, model_config
from sglang_core.ops import OPS
from tests.models.harness import PAGE_SIZE, Stepper, build_context
from tests.models.tiny import reference
from tests.weights.test_loader import CONFIG, Ranked
from tests.weights.test_quantization_flag import load_as

TAKES = frozenset({"takes_codes"})
WHOLE = (
    Kernel("norm.add_rms_quant", provider="acme", fn="sglang_core.ops.norm:add_rms_norm_quant", device=("*",)),
    Kernel("act.gated_quant", provider="acme", fn="sglang_core.ops.activation:gated_quant", device=("*",)),
)
GEMM = Kernel("gemm.linear", provider="acme", fn="sglang_core.ops.gemm:linear", device=("*",), features=TAKES)


def context(*kernels: Kernel, overrides: dict[str, str] | None = None, **facts: Any) -> BuildContext:
    backend = CpuBackend()
    table = OpTable(backend.probe()[0], backend, ops=OPS, kernels=kernels, page_size=PAGE_SIZE, overrides=overrides)
    return replace(build_context(**facts), table=table)


def bound(ctx: BuildContext, quantization: str = "int8") -> CausalLM:
    cfg = model_config(CONFIG)
    model = type(create_model(CONFIG))(cfg.replace(quantization=online_quant_config(quantization, cfg.quantization)))
    bind_model(model, ctx)
    return model


def handed(model: CausalLM) -> list[str]:
    """The kind of codes of a layer's two norms and its MLP."""
    layer = model.get_submodule("model.layers.1")
    return [m.codes for m in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp)]


@pytest.mark.parametrize(("quantization", "kind"), [("int8", "int8"), ("fp8", "fp8"), ("int4", "")])
def test_codes_are_of_the_kind_that_the_weights_ask_for(quantization: str, kind: str) -> None:
    assert handed(bound(context(GEMM, *WHOLE), quantization)) == [kind] * 3
    assert handed(bound(context(GEMM, *WHOLE, tp=Ranked(0, 2)), quantization)) == [kind] * 3


def test_a_kernel_that_takes_no_codes_gets_none() -> None:
    assert handed(bound(context(replace(GEMM, features=frozenset()), *WHOLE))) == [""] * 3
    assert handed(bound(context(*WHOLE))) == [""] * 3


def test_without_a_kernel_that_makes_them_linear_layers_quantise_themselves() -> None:
    assert handed(bound(context(GEMM, WHOLE[1]))) == ["", "", "int8"]
    refused = context(GEMM, *WHOLE, overrides={"act.gated_quant": "reference"})
    assert handed(bound(refused)) == ["int8", "int8", ""]


def test_adapters_multiply_what_was_not_rounded() -> None:
    spec = LoraSpec(num_slots=2, max_rank=4, targets=frozenset({"q_proj"}))
    assert handed(bound(replace(context(GEMM, *WHOLE), lora=spec))) == ["", "int8", "int8"]


@pytest.mark.parametrize("name", ["llama3", "gemma2", "mixtral", "qwen3-moe", "gpt-oss"])
def test_logits_keep_every_bit(name: str, tmp_path: Path) -> None:
    """In every model that says what its norms feed."""
    folder = reference(name, tmp_path).folder
    config = json.loads((folder / "config.json").read_text())
    fused, plain = (load_as("int8", folder, config, ctx) for ctx in (context(GEMM, *WHOLE), context(GEMM)))
    assert fused.get_submodule("model.layers.1.input_layernorm").codes == "int8"
    assert torch.equal(*(Stepper(model).logits(list(range(3, 17))) for model in (fused, plain)))
