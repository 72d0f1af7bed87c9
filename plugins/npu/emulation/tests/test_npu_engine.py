"""Whole models on the emulated NPU: the demo model's tokens, and transformers' log-probabilities of tiny models of other families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang_npu import ragged
from sglang_npu_emulation import contract
from torch import Tensor

from sglang_core import Engine
from sglang_core.api import ConfigError
from tests.models.tiny import Reference, reference

PROMPTS = ["The capital of France is", "One, two, three", "x", "Hello! How are you today?"]
SETTINGS: dict[str, Any] = {
    "in_process": True,
    "max_running_requests": 3,
    "chunked_prefill_size": 16,
    "max_total_tokens": 1024,
}
GREEDY = {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True}


def generated(device: str, **settings: Any) -> list[list[int]]:
    """Twice: the second time prefixes come from the cache, and decodes are replayed."""
    with Engine(model_path="demo", device=device, context_length=128, **SETTINGS, **settings) as engine:
        return [a["output_ids"] for _ in range(2) for a in engine.generate(PROMPTS, GREEDY)]


def test_the_demo_model_gives_the_references_tokens() -> None:
    assert generated("npu_emulated", dtype="float32") == generated("cpu", dtype="float32")


def test_codes_in_the_pool_give_nearly_the_same_tokens() -> None:
    """Those of the reference's own pool of codes; bfloat16 rounds otherwise here and there, and a text goes another way from then on."""
    ours, theirs = (generated(device, kv_cache_dtype="int8", page_size=32) for device in ("npu_emulated", "cpu"))
    assert ours[:4] == ours[4:]
    same = [a == b for one, other in zip(ours, theirs, strict=True) for a, b in zip(one, other, strict=True)]
    assert sum(same) >= 0.7 * len(same), same


# What a forward of each family calls, beside norms, rotation and writes.
ATTENTION = "npu_fused_infer_attention_score_v2"
EXPERTS = {"npu_moe_gating_top_k", "npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_moe_finalize_routing"}
COMMON = {"npu_rms_norm", "npu_add_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_scatter_pa_kv_cache", ATTENTION}
FAMILIES: dict[str, set[str]] = {
    "llama31": COMMON,
    "llama32": COMMON,
    "qwen3-bias": COMMON,
    "qwen3-moe-tied": COMMON | EXPERTS,
    "mistral": COMMON,
    "gemma3": COMMON - {"npu_swiglu", "npu_add_rms_norm"},
    "deepseek-v2-lite": COMMON | EXPERTS,
    "deepseek-v3-neox": COMMON | EXPERTS,
}


def errors(ref: Reference, device: str, **settings: Any) -> Tensor:
    """|log-probability - transformers'| of every token of the reference's texts, in bfloat16."""
    rows = []
    facts = {"model_path": str(ref.folder), "dtype": "bfloat16", "skip_tokenizer_init": True, "context_length": 128}
    with Engine(device=device, **facts, **SETTINGS, **settings) as engine:
        asked = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
        answers = engine.generate(
            input_ids=[list(t) for t in ref.tokens], sampling_params=asked, return_logprob=True, logprob_start_len=0
        )
        for tokens, logits, answer in zip(ref.tokens, ref.logits, answers, strict=True):
            expected = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            made = torch.tensor([p[0] for p in answer["meta_info"]["input_token_logprobs"][1:]])
            rows.append((made - expected).abs())
    return torch.cat(rows)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("page_size", [128, 16])
def test_log_probabilities_are_those_of_transformers(
    name: str, page_size: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, as near as the reference backend comes; and each vendor's op that the family stands for was called."""
    ref = reference(name, tmp_path_factory.getbasetemp())
    called: set[str] = set()
    compare = contract._compare
    monkeypatch.setattr(contract, "_compare", lambda op, *args: (called.add(op), compare(op, *args))[1])
    theirs, ours = (errors(ref, device, page_size=page_size).median() for device in ("cpu", "npu_emulated"))
    assert ours <= 2 * theirs + 0.01, (ours, theirs)
    assert FAMILIES[name] <= called


def test_a_prefill_of_latents_is_one_call_of_its_reqs(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What core expands of it: the new tokens of all reqs, and cached ones beside their queries."""
    called: list[tuple[int, bool]] = []
    attend = ragged._attend

    def noted(q: Tensor, k: Tensor, v: Tensor, run: ragged.Run, *args: Any, **kwargs: Any) -> Any:
        assert kwargs["packed"] and q.shape[-1] == k.shape[-1] == v.shape[-1] == 128
        called.append((len(run.q_ends), run.q_ends == run.k_ends))
        return attend(q, k, v, run, *args, **kwargs)

    monkeypatch.setattr(ragged, "_attend", noted)
    errors(reference("deepseek-v2-lite", tmp_path_factory.getbasetemp()), "npu_emulated")
    assert max(num for num, own in called if own) > 1 and any(not own for _, own in called), called


def test_soft_caps_are_refused_by_name_and_run_on_the_definition_if_asked(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    ref = reference("gemma2", tmp_path_factory.getbasetemp())
    with pytest.raises(ConfigError, match=r"soft caps \(the vendor's op has no such argument\)"):
        errors(ref, "npu_emulated")
    theirs, ours = errors(ref, "cpu").median(), errors(ref, "npu_emulated", fallback="warn").median()
    assert ours <= 2 * theirs + 0.01, (ours, theirs)
