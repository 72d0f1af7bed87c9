"""What only a model with recurrent states has: each part of its layers matters, and states are kept, left and taken up right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_core import Engine
from sglang_core.errors import ConfigError
from sglang_core.layers.attention import Attention
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.gated_delta_net import GatedDeltaNet
from sglang_core.models.registry import model_config
from sglang_core.weights.checkpoint import read_config
from tests.models.harness import PAGE_SIZE, Row, Stepper, load
from tests.models.test_parity import BOUND, error
from tests.models.tiny import NUM_NEW, PROMPT_LENS, VOCAB, hf_model, reference

CASE = "qwen3-next"
SILU_IS_ONE = 1.2784645  # x sigmoid(x) = 1


def nets(model: CausalLM) -> list[GatedDeltaNet]:
    return [layer for layer in model.modules() if isinstance(layer, GatedDeltaNet)]


def rule_with(change: Callable[..., tuple[Tensor, ...]]) -> Callable[[CausalLM], None]:
    """The rule gets what `change(q, k, v, g, beta)` makes of its inputs."""

    def apply(model: CausalLM) -> None:
        for net in nets(model):
            rule = net._rule
            net._rule = lambda *args, rule=rule: rule(*change(*args[:5]), *args[5:])

    return apply


def spec_with(**changes: Any) -> Callable[[CausalLM], None]:
    def apply(model: CausalLM) -> None:
        for net in nets(model):
            net.spec = replace(net.spec, **changes)

    return apply


def no_conv(model: CausalLM) -> None:
    for net in nets(model):
        net.conv1d.weight[:, :-1] = 0
        net.conv1d.weight[:, -1] = 1


def no_conv_activation(model: CausalLM) -> None:
    for net in nets(model):
        conv = net._conv
        net._conv = lambda *args, conv=conv, activation: conv(*args)


def no_z_gate(model: CausalLM) -> None:
    for net in nets(model):
        norm = net.norm.forward
        net.norm.forward = lambda o, z, norm=norm: norm(o, torch.full_like(z, SILU_IS_ONE))  # type: ignore[method-assign, misc]


def no_output_gate(model: CausalLM) -> None:
    """Gates of 40: their sigmoid is 1."""
    for layer in model.modules():
        if isinstance(layer, Attention):
            heads, dim = layer.spec.num_heads, layer.spec.head_dim
            weight = layer.qkv_proj.weight["weight"]
            layer.qkv_proj.bias = torch.zeros(weight.shape[0])
            layer.qkv_proj.bias[: 2 * heads * dim].view(heads, 2, dim)[:, 1] = 40
            weight[: 2 * heads * dim].view(heads, 2, dim, -1)[:, 1] = 0


def forgets_states(model: CausalLM) -> None:
    for net in nets(model):
        plan = net.plan
        net.plan = lambda spec, batch, device, plan=plan: plan(
            spec, replace(batch, read_slots_cpu=torch.zeros_like(batch.read_slots_cpu)), device
        )


FEATURES: dict[str, Callable[[CausalLM], None]] = {
    "convolution": no_conv,
    "activation after the convolution": no_conv_activation,
    "decay": rule_with(lambda q, k, v, g, beta: (q, k, v, g * 0, beta)),
    "beta": rule_with(lambda q, k, v, g, beta: (q, k, v, g, torch.ones_like(beta))),
    "beta and decay of their own heads": rule_with(lambda q, k, v, g, beta: (q, k, v, g.flip(1), beta.flip(1))),
    "l2 norm of queries and keys": spec_with(qk_l2norm=False),
    "scale of queries": spec_with(scale=1.0),
    "which key head a value head reads": rule_with(lambda q, k, v, g, beta: (q.flip(1), k.flip(1), v, g, beta)),
    "gate of a net's output": no_z_gate,
    "gate of attention's output": no_output_gate,
    "a state that is carried on": forgets_states,
}


def in_chunks(stepper: Stepper, tokens: list[int], size: int) -> Tensor:
    row = Row()
    return torch.cat([stepper.step([(row, tokens[i : i + size])])[0] for i in range(0, len(tokens), size)])


@pytest.mark.parametrize("feature", FEATURES)
def test_without_it_logits_are_off(feature: str, checkpoints: Path) -> None:
    ref = reference(CASE, checkpoints)
    model = load(ref.folder)
    assert error(in_chunks(Stepper(model), ref.tokens[0], 7), ref.logits[0]) < BOUND
    FEATURES[feature](model)
    assert error(in_chunks(Stepper(model), ref.tokens[0], 7), ref.logits[0]) > 10 * BOUND


@pytest.mark.parametrize("size", [150, 100, 64, 17])
def test_a_long_text_in_chunks_of_any_size(size: int, checkpoints: Path) -> None:
    """Up to three chunks of the chunked form, cut anew by each size of a prefill chunk."""
    tokens = torch.randint(3, VOCAB, (150,), generator=torch.Generator().manual_seed(4)).tolist()
    with torch.no_grad():
        expected = hf_model(CASE)(torch.tensor([tokens])).logits[0].float()
    ours = in_chunks(Stepper(load(reference(CASE, checkpoints).folder)), tokens, size)
    assert error(ours, expected) < BOUND


def test_a_rejected_draft_leaves_no_trace(checkpoints: Path) -> None:
    """The state before it is where it was: the req goes on from there."""
    ref = reference(CASE, checkpoints)
    stepper, row, tokens = Stepper(load(ref.folder)), Row(), ref.tokens[0]
    stepper.step([(row, tokens[:12])])
    draft = Row(row.num_tokens, list(row.pages), dict(row.states))
    stepper.step([(draft, [t + 1 for t in tokens[12:15]])])
    (ours,) = stepper.step([(row, tokens[12:])])
    assert error(ours, ref.logits[0][12:]) < BOUND


def test_two_reqs_go_on_from_one_kept_state(checkpoints: Path) -> None:
    ref = reference(CASE, checkpoints)
    stepper, row, tokens = Stepper(load(ref.folder)), Row(), ref.tokens[0]
    stepper.step([(row, tokens[: 2 * PAGE_SIZE])])
    both = [stepper.share_prefix(row, 2 * PAGE_SIZE) for _ in range(2)]
    for ours in stepper.step([(other, tokens[2 * PAGE_SIZE :]) for other in both]):
        assert error(ours, ref.logits[0][2 * PAGE_SIZE :]) < BOUND


def test_the_pools_hold_keys_of_some_layers_and_states_of_the_others(checkpoints: Path) -> None:
    specs = load(reference(CASE, checkpoints).folder).pool_specs(PAGE_SIZE, torch.float32)
    assert {group: spec.num_layers for group, spec in specs.items()} == {"full": 1, "state": 3}
    assert specs["state"].conv_shape == (3, 2 * 2 * 12 + 6 * 10)  # type: ignore[union-attr]
    assert specs["state"].state_shape == (6, 12, 10)  # type: ignore[union-attr]


@pytest.mark.parametrize("device", ["cpu", "strict"])
@pytest.mark.parametrize("settings", [{}, {"chunked_prefill_size": 5}, {"disable_radix_cache": True}])
def test_the_engine_gives_transformers_tokens(device: str, settings: dict[str, Any], checkpoints: Path) -> None:
    """The second time from the cache: a prefix is of use up to where a state of it was kept."""
    ref = reference(CASE, checkpoints)
    prompts = [t[:n] for t, n in zip(ref.tokens, PROMPT_LENS, strict=True)]
    sampling = {"temperature": 0, "max_new_tokens": NUM_NEW, "ignore_eos": True}
    common = {"device": device, "dtype": "float32", "in_process": True, "page_size": PAGE_SIZE}
    sizes = {"max_total_tokens": 512, "max_running_requests": 4}
    with Engine(model_path=str(ref.folder), skip_tokenizer_init=True, **common, **sizes, **settings) as engine:
        for again in (False, True):
            answers = engine.generate(input_ids=prompts, sampling_params=sampling)
            made = [answer["output_ids"] for answer in answers]
            assert made == [t[n:] for t, n in zip(ref.tokens, PROMPT_LENS, strict=True)]
            cached = sum(answer["meta_info"]["cached_tokens"] for answer in answers)
            assert (cached > 0) is (again and "disable_radix_cache" not in settings)


def test_an_older_config_says_the_same(checkpoints: Path) -> None:
    """Published files have no layer_types, and rope parameters of the older kind."""
    new = read_config(reference(CASE, checkpoints).folder)
    old = {k: v for k, v in new.items() if k not in ("layer_types", "rope_parameters")}
    old |= {"full_attention_interval": 4, "rope_theta": 100.0, "rope_scaling": None, "partial_rotary_factor": 0.5}
    assert model_config(old) == model_config(new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_num_value_heads": 5}, "linear_num_value_heads=5 must be a multiple of linear_num_key_heads=2"),
        ({"layer_types": ["sliding_attention"] * 4}, "there must be 4 of linear_attention, full_attention"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim=1"),
        ({"linear_key_head_dim": 0}, "linear_key_head_dim=0"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, object], message: str, checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config(json.loads(json.dumps(read_config(reference(CASE, checkpoints).folder) | change)))
