"""The projection of q, k, v and z in every quantised format: side by side, whether its rows may part or the product's columns must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_core.layers.gated_delta_net import GatedDeltaNet, QKVZLinear
from sglang_core.ops import quant
from sglang_core.ops.formats import Fmt
from tests.weights.test_loader import Ranked
from tests.weights.test_quantised import KINDS, load, logit_bound, write

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_size": 256,
    "intermediate_size": 256,
    "mlp_only_layers": [0],
    "num_hidden_layers": 1,
    "layer_types": ["linear_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "vocab_size": 37,
    "max_position_embeddings": 64,
}
LINEARS = ("_proj.weight", "_qkvz.weight", "_ba.weight")
BLOCKS = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
ODD = {"linear_key_head_dim": 12}  # no multiple of the 8 codes in a word
CASES = [
    *[(kind, {}, kind == "fp8 block") for kind in KINDS],
    ("fp8 block", BLOCKS, False),
    *[(kind, ODD, True) for kind in ("awq", "gptq")],
    ("ct pack", ODD, False),  # its words run along a row
]


def side_by_side(rows: Tensor, net: GatedDeltaNet) -> Tensor:
    """Rows of whole key heads, as a checkpoint has them -> all of q, of k, of v, of z."""
    sizes = net.delta.by_key_head
    parts = rows.unflatten(0, (-1, sum(sizes))).split(list(sizes), dim=1)
    return torch.cat([part.flatten(0, 1) for part in parts])


@pytest.mark.parametrize("rank", [None, 0, 1])
@pytest.mark.parametrize(("kind", "changes", "rows_stay"), CASES)
def test_rows_or_columns_are_put_in_order(
    kind: str,
    changes: dict[str, int],
    rows_stay: bool,
    rank: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linears = LINEARS
    if kind == "fp8 block":  # the published one leaves out b and a, whose few rows share a block
        fmt, quantization, save = KINDS[kind]
        ignored = {"modules_to_not_convert": ["model.layers.0.linear_attn.in_proj_ba"]}
        monkeypatch.setitem(KINDS, kind, (fmt, quantization | ignored, save))
        linears = LINEARS[:2]
    plain = write(tmp_path, kind, config=CONFIG | changes, quantised=linears)
    of_rank = {} if rank is None else {"tp": Ranked(rank, 2)}
    net = load(tmp_path, **of_rank).model.layers[0].linear_attn
    linear, whole = net.in_proj_qkvz, plain["model.layers.0.linear_attn.in_proj_qkvz.weight"]
    assert isinstance(linear, QKVZLinear) and linear.weight.fmt == KINDS[kind][0]
    assert (linear.order is not None) is rows_stay
    mine = side_by_side(whole if rank is None else whole.chunk(2)[rank], net)
    held = quant.dequantize(linear.weight)
    assert torch.equal(held if linear.order is None else held[linear.order], mine)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    want = x @ mine.T
    assert float((linear(x) - want).abs().max() / want.abs().max()) < logit_bound(Fmt.parse(linear.weight.fmt))
