"""A gated MLP takes a kernel of both projections and the activation where one takes its weight as it is, and nothing of a result changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_core.backend.kernel import Kernel
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.lora import LoraSpec
from sglang_core.ops.activation import GateKind, gated
from sglang_core.ops.gemm import linear
from sglang_core.ops.weight import PackedWeight
from tests.layers.test_fed_layers import GEMM, bound, context
from tests.models.harness import Stepper
from tests.models.tiny import reference
from tests.weights.test_quantization_flag import load_as

PACKING: dict[str, Any] = {"pack": f"{__name__}:pack", "unpack": f"{__name__}:unpack", "packed_layout": "acme/1"}
PLAIN = Kernel("gemm.linear", provider="acme", fn=f"{__name__}:product", device=("*",), **PACKING)
WHOLE = Kernel("gemm.linear_gated", provider="acme", fn=f"{__name__}:whole", device=("*",), **PACKING)


def pack(w: PackedWeight, out: PackedWeight | None = None) -> PackedWeight:
    """Rows in reverse."""
    tensors = {name: tensor.flip(0).contiguous() for name, tensor in w.named_buffers()}
    return PackedWeight(w.fmt, tensors, out_features=w.out_features, in_features=w.in_features, layout="acme/1")


def unpack(w: PackedWeight) -> PackedWeight:
    tensors = {name: tensor.flip(0).contiguous() for name, tensor in w.named_buffers()}
    return PackedWeight(w.fmt, tensors, out_features=w.out_features, in_features=w.in_features)


def product(x: Tensor, w: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return linear(x, unpack(w), bias)


def whole(x: Tensor, w: PackedWeight, kind: GateKind, bias: Tensor | None = None) -> Tensor:
    return gated(product(x, w, bias), kind)


def runs_whole(model: CausalLM) -> bool:
    return model.get_submodule("model.layers.1.mlp")._whole is not None


def test_a_kernel_that_packs_as_the_linear_layers_do_is_taken() -> None:
    ctx = context(PLAIN, WHOLE)
    assert runs_whole(bound(ctx, "int8"))
    row = next(row for row in ctx.table.explain() if row.op == "gemm.linear_gated")
    assert (row.provider, row.fmt, row.layer) == ("acme", "int8.token_channel", "GateUpLinear")


@pytest.mark.parametrize(
    "other",
    [
        replace(WHOLE, packed_layout="acme/2"),
        replace(WHOLE, pack=f"{__name__}:unpack"),
        replace(WHOLE, pack=None, unpack=None, packed_layout=""),
        replace(WHOLE, supports=lambda ctx: "no such gate"),
    ],
    ids=["another layout", "another pack", "packs nothing", "refuses"],
)
def test_any_other_is_not(other: Kernel) -> None:
    ctx = context(PLAIN, other)
    assert not runs_whole(bound(ctx))
    assert "gemm.linear_gated" not in {row.op for row in ctx.table.explain()}


def test_not_where_something_comes_between() -> None:
    spec = LoraSpec(num_slots=2, max_rank=4, targets=frozenset({"up_proj"}))
    assert not runs_whole(bound(replace(context(PLAIN, WHOLE), lora=spec)))
    assert not runs_whole(bound(context(GEMM, replace(WHOLE, pack=None, unpack=None, packed_layout=""))))  # takes codes


@pytest.mark.parametrize("flag", [{"gemm.linear_gated": "decomposed"}, {"gemm.linear": "reference"}])
def test_a_user_takes_it_apart(flag: dict[str, str]) -> None:
    assert not runs_whole(bound(context(PLAIN, WHOLE, overrides=flag), "int4"))


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen2"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_logits_keep_every_bit(name: str, quantization: str, tmp_path: Path) -> None:
    folder = reference(name, tmp_path).folder
    config = json.loads((folder / "config.json").read_text())
    fused, plain = (load_as(quantization, folder, config, ctx) for ctx in (context(PLAIN, WHOLE), context(PLAIN)))
    assert runs_whole(fused) and not runs_whole(plain)
    assert torch.equal(*(Stepper(model).logits(list(range(3, 17))) for model in (fused, plain)))
