"""Latent attention's two paths give the same logits, whichever a step takes; the engine's tokens are transformers'."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_core import Engine
from sglang_core.errors import ConfigError
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.models.registry import model_config
from sglang_core.ops import mla
from sglang_core.ops.attention import AttnBatch
from sglang_core.ops.mla import Bools, MLAPlan, MLASpec
from sglang_core.weights.checkpoint import read_config
from tests.models.harness import Row, Stepper, load
from tests.models.test_parity import BOUND, error
from tests.models.tiny import NUM_NEW, PROMPT_LENS, hf_model, reference

CASES = ("deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3-neox")
Rule = Callable[[MLASpec, AttnBatch], Bools]


def always(value: bool) -> Rule:
    return lambda spec, batch: np.full(batch.num_reqs, value)


def alternating(spec: MLASpec, batch: AttnBatch) -> Bools:
    return np.arange(batch.num_reqs) % 2 == 0


RULES: dict[str, Rule] = {"absorbed": always(False), "expanded": always(True), "by turns": alternating}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_each_path_gives_transformers_logits(
    case: str, rule: str, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached prefixes too are taken by the path that is forced; they are expanded seven tokens at a time."""
    monkeypatch.setattr(mla, "is_expanded", RULES[rule])
    monkeypatch.setattr(mla, "EXPANDED_ELEMENTS", 0)
    monkeypatch.setattr(mla, "KEYS_PER_CHUNK", 7)
    ref = reference(case, checkpoints)
    stepper = Stepper(load(ref.folder))
    rows, sizes = [Row() for _ in ref.tokens], (5, 1, 11)
    parts: list[list[torch.Tensor]] = [[] for _ in rows]
    while work := [i for i, row in enumerate(rows) if row.num_tokens < len(ref.tokens[i])]:
        chunks = [(rows[i], ref.tokens[i][rows[i].num_tokens :][: sizes[i]]) for i in work]
        for i, logits in zip(work, stepper.step(chunks), strict=True):
            parts[i].append(logits)
    assert max(error(torch.cat(p), b) for p, b in zip(parts, ref.logits, strict=True)) < BOUND


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any op makes; views, and what is written in place, were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if all(value.alias_info is None for value in func._schema.returns):
            made = out if isinstance(out, tuple | list) else [out]
            self.numel = max([self.numel, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return out


def largest_of_a_chunk(model: CausalLM, prefix: int) -> int:
    """In the attention of 8 new tokens after a cached prefix, which is expanded."""
    stepper, row = Stepper(model), Row()
    tokens = [3 + i % 100 for i in range(prefix + 8)]
    stepper.step([(row, tokens[:prefix])])
    fb = stepper.batch([(row, tokens[prefix:])])
    with torch.inference_mode(), Largest() as largest:
        model.get_submodule("model.layers.0.self_attn")(torch.randn(8, 64), fb)
    return largest.numel


def test_what_an_expansion_holds_does_not_grow_with_the_prefix(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mla, "is_expanded", RULES["expanded"])
    model = load(reference("deepseek-v2-lite", checkpoints).folder)
    per_token = 4 * (12 + 8 + 10)  # of 4 heads: nope, rope and value dims
    whole = [largest_of_a_chunk(model, prefix) for prefix in (60, 240)]
    assert whole[1] > 3 * whole[0], "the largest is no expansion"
    monkeypatch.setattr(mla, "KEYS_PER_CHUNK", 1)
    monkeypatch.setattr(mla, "EXPANDED_ELEMENTS", 30 * per_token)
    short, long = (largest_of_a_chunk(model, prefix) for prefix in (60, 240))
    assert short == long <= 30 * per_token


def test_a_mixed_step_takes_both_paths(checkpoints: Path) -> None:
    ref = reference("deepseek-v3", checkpoints)
    stepper = Stepper(load(ref.folder))
    row = Row()
    stepper.step([(row, ref.tokens[0][:-1])])
    (plan,) = stepper.batch([(row, ref.tokens[0][-1:]), (Row(), ref.tokens[1])]).plans.values()
    assert isinstance(plan, MLAPlan) and plan.absorbed_tokens is not None and plan.expanded is not None
    assert plan.absorbed_tokens.tolist() == [0]


def test_the_pool_holds_latents_and_no_heads(checkpoints: Path) -> None:
    model = load(reference("deepseek-v3", checkpoints).folder)
    (spec,) = model.pool_specs(4, torch.float32).values()
    assert (spec.kind, spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.v_head_dim) == ("mla", 3, 1, 24, 8)


@pytest.mark.parametrize("settings", [{}, {"chunked_prefill_size": 5}, {"disable_radix_cache": True}])
@pytest.mark.parametrize("case", ["deepseek-v2", "deepseek-v3"])
def test_the_engine_gives_transformers_tokens(case: str, settings: dict[str, object], checkpoints: Path) -> None:
    ref = reference(case, checkpoints)
    prompts = [t[:n] for t, n in zip(ref.tokens, PROMPT_LENS, strict=True)]
    sampling = {"temperature": 0, "max_new_tokens": NUM_NEW, "ignore_eos": True}
    common = {"device": "cpu", "dtype": "float32", "in_process": True, "max_total_tokens": 512, "page_size": 4}
    with Engine(model_path=str(ref.folder), skip_tokenizer_init=True, **common, **settings) as engine:
        for _ in range(2):  # the second time from the cache
            answers = engine.generate(input_ids=prompts, sampling_params=sampling)
            made = [answer["output_ids"] for answer in answers]
            assert made == [t[n:] for t, n in zip(ref.tokens, PROMPT_LENS, strict=True)]


def test_kimi_k2_is_deepseek_v3_by_another_name(checkpoints: Path) -> None:
    config = read_config(reference("deepseek-v3", checkpoints).folder)
    ours = config | {"model_type": "kimi_k2", "auto_map": {"AutoModel": "modeling_deepseek.DeepseekV3Model"}}
    assert model_config(ours).replace(model_type="deepseek_v3") == model_config(config)


def test_an_older_config_says_the_same() -> None:
    new = hf_model("deepseek-v2").config.to_dict() | {"architectures": ["DeepseekV2ForCausalLM"]}
    old = dict(new)
    yarn = dict(old.pop("rope_parameters"))
    old |= {"rope_theta": yarn.pop("rope_theta"), "rope_scaling": yarn | {"type": yarn.pop("rope_type")}}
    old.pop("head_dim")
    assert model_config(old) == model_config(new)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("deepseek-v2", {"topk_method": "noaux_tc"}),
        ("deepseek-v2", {"norm_topk_prob": True}),
        ("deepseek-v3", {"scoring_func": "softmax"}),
        ("deepseek-v3", {"moe_layer_freq": 2}),
    ],
)
def test_another_routing_is_refused(case: str, change: dict[str, object], checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        model_config(read_config(reference(case, checkpoints).folder) | change)
