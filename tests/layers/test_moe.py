"""The mixture-of-experts layer: what it wants, where its weights go, how ranks share it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_core.errors import ConfigError, WeightError
from sglang_core.layers.build import bind_model
from sglang_core.layers.experts import Experts
from sglang_core.layers.model_config import ModelConfig
from sglang_core.models.registry import create_model
from sglang_core.weights.loader import Wants, load_model
from tests.layers.test_layers import dummy, fake_step
from tests.models.harness import build_context
from tests.weights.test_loader import TOKENS, Ranked

CONFIG = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [0],
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,
    "max_position_embeddings": 64,
}


def experts(model: Any) -> Experts:
    found = model.model.layers[1].mlp.experts
    assert isinstance(found, Experts)
    return found


def test_a_step_never_looks_at_a_value() -> None:
    assert fake_step(dummy(CONFIG)).shape == (len(TOKENS) + 1, 37)


def test_each_matrix_goes_into_its_place_in_the_stacks() -> None:
    model = create_model(CONFIG)
    bind_model(model, build_context())
    layer = experts(model)
    specs = layer.weights("e")
    assert [s.name for s in specs[3:6]] == [f"e.1.{n}_proj.weight" for n in ("gate", "up", "down")]
    parts = [torch.randn(s.part_shape) for s in specs]
    places = {i: layer.place(i, parts[i]) for i in torch.randperm(len(parts)).tolist()}  # files come in any order
    assert len({p.untyped_storage().data_ptr() for p in places.values()}) == 2  # nothing is held beside the stacks
    layer.load([places[i] for i in range(len(parts))])
    assert (layer.w13.num_experts, layer.w13.out_features, layer.w13.in_features) == (4, 48, 32)
    for i in range(4):
        gate, up, down = parts[3 * i : 3 * i + 3]
        assert torch.equal(layer.w13["weight"][i], torch.cat([gate, up]))
        assert torch.equal(layer.w2["weight"][i], down)


def test_ranks_hold_shares_of_every_expert_and_sum_to_the_whole() -> None:
    whole = dummy(CONFIG)
    h, weights = torch.randn(5, 32), torch.rand(5, 2)
    ids = torch.tensor([[0, 3], [1, 2], [3, 1], [2, 0], [0, 1]], dtype=torch.int32)
    total: Tensor = torch.zeros(5, 32)
    for rank in range(2):
        part = load_model(create_model(CONFIG), "", build_context(tp=Ranked(rank, 2)), load_format="dummy")
        assert experts(part).width == 12
        total = total + experts(part)(h, weights, ids)
    torch.testing.assert_close(total, experts(whole)(h, weights, ids))
    with pytest.raises(ConfigError, match="intermediate_size of an expert=24"):
        experts(create_model(CONFIG)).bind(build_context(tp=Ranked(0, 5)))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_hold_whole_experts_and_sum_to_the_whole(num_ranks: int) -> None:
    """Over four ranks two share the two experts of each group."""
    h, weights = torch.randn(5, 32), torch.rand(5, 2)
    ids = torch.tensor([[0, 3], [1, 2], [3, 1], [2, 0], [0, 1]], dtype=torch.int32)
    total: Tensor = torch.zeros(5, 32)
    for rank in range(num_ranks):
        ctx = build_context(tp=Ranked(rank, num_ranks), ep_size=2)
        part = experts(load_model(create_model(CONFIG | {"num_key_value_heads": 4}), "", ctx, load_format="dummy"))
        assert (part.num_held, part.width, part.w13.num_experts) == (2, 48 // num_ranks, 2)
        first = rank // (num_ranks // 2) * 2
        assert part.experts == range(first, first + 2)
        total = total + part(h, weights, ids)
    torch.testing.assert_close(total, experts(dummy(CONFIG))(h, weights, ids))
    with pytest.raises(ConfigError, match="ep_size=2 does not divide tp_size=3"):
        experts(create_model(CONFIG)).bind(build_context(tp=Ranked(0, 3), ep_size=2))


def test_bytes_are_counted_before_loading() -> None:
    model = create_model(CONFIG)
    bind_model(model, build_context())
    sizes = {name: users[0][2].nbytes for name, users in Wants(model).specs.items() if ".mlp.experts." in name}
    assert len(sizes) == 4 * 3
    assert sum(sizes.values()) == 4 * 3 * 32 * 24 * 4


def test_what_a_checkpoint_lacks_is_named(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    save_file({"model.layers.1.mlp.experts.gate_up_proj": torch.ones(4, 48, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"1 unexpected \(model.layers.1.mlp.experts.gate_up_proj\)"):
        load_model(create_model(CONFIG), tmp_path, build_context(), progress=False)


def test_facts_of_config_files() -> None:
    cfg = ModelConfig.from_hf(CONFIG)
    assert cfg.moe is not None
    assert cfg.moe.sparse == (False, True)
    assert (cfg.moe.route.num_experts, cfg.moe.route.renormalize, cfg.moe.shared_gate) == (4, False, True)
    assert ModelConfig.from_hf(CONFIG | {"model_type": "llama"}).moe is None
    later = {k: v for k, v in CONFIG.items() if k != "num_experts"} | {"num_local_experts": 4}
    assert ModelConfig.from_hf(later) == cfg
    for bad in (0, 5, None, "2"):
        with pytest.raises(ConfigError, match="num_experts_per_tok"):
            ModelConfig.from_hf(CONFIG | {"num_experts_per_tok": bad})
    with pytest.raises(ConfigError, match="moe_intermediate_size"):
        ModelConfig.from_hf(CONFIG | {"moe_intermediate_size": 0})


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_model_in_bfloat16(dtype: torch.dtype) -> None:
    model = dummy(CONFIG, dtype=dtype)
    assert experts(model).w13["weight"].dtype == dtype
