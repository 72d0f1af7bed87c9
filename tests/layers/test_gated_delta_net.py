"""The gated delta net layer: what it wants of the checkpoint, and which heads of it a rank holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_core.errors import ConfigError
from sglang_core.layers.build import bind_model
from sglang_core.layers.gated_delta_net import GatedDeltaConfig, GatedDeltaNet
from sglang_core.models.registry import create_model
from tests.layers.test_layers import dummy, fake_step
from tests.models.harness import build_context
from tests.weights.test_loader import TOKENS, Ranked

CONFIG = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 5,
    "vocab_size": 37,
    "max_position_embeddings": 64,
}


def net(rank: int, size: int, **changes: object) -> GatedDeltaNet:
    model = create_model(CONFIG | changes)
    bind_model(model, build_context(tp=Ranked(rank, size)))
    found: Any = model.model.layers[0].linear_attn  # type: ignore[index, union-attr]
    assert isinstance(found, GatedDeltaNet)
    return found


def test_a_step_never_looks_at_a_value() -> None:
    assert fake_step(dummy(CONFIG)).shape == (len(TOKENS) + 1, 37)


def test_defaults_are_those_of_the_published_models() -> None:
    assert GatedDeltaConfig.from_hf({}) == GatedDeltaConfig(
        num_k_heads=16, num_v_heads=32, k_head_dim=128, v_head_dim=128, conv_width=4
    )


def test_ranks_hold_whole_heads() -> None:
    """Key heads [1, 2) and value heads [3, 6) on rank 1; the convolution's channels are cut in three places."""
    layer = net(1, 2)
    assert (layer.spec.num_k_heads, layer.spec.num_v_heads, layer.spec.conv_dim) == (1, 3, 4 + 4 + 15)
    (conv,) = layer.conv1d.weights("c")
    assert (conv.name, conv.shape, conv.ranges) == ("c.weight", (46, 1, 4), ((4, 8), (12, 16), (31, 46)))
    assert {w.name: w.ranges for w in layer.weights("n")} == {"n.A_log": ((3, 6),), "n.dt_bias": ((3, 6),)}
    assert [w.ranges for w in layer.in_proj_qkvz.weights("p")] == [((38, 42), (42, 46), (46, 61), (61, 76))]
    assert [w.ranges for w in layer.in_proj_ba.weights("p")] == [((6, 12),)]
    assert layer.pool_spec(1, 16, torch.bfloat16).state_shape == (3, 4, 5)


def test_decay_stays_in_float32() -> None:
    """The exponent of A_log and a softplus near zero would lose their low bits in a half type."""
    assert {w.dtype for w in net(0, 1).weights("n")} == {torch.float32}


def test_a_pool_of_states_has_its_own_dtypes() -> None:
    spec = net(0, 1).pool_spec(3, 16, torch.float8_e4m3fn)
    assert (spec.num_layers, spec.conv_dtype, spec.state_dtype) == (3, torch.float32, torch.float32)


def test_heads_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="linear_num_key_heads=1 cannot be divided over tp_size=2"):
        net(0, 2, linear_num_key_heads=1)
