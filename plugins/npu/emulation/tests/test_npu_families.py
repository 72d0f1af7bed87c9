"""Every family of models on the emulated NPU: transformers' log-probabilities of a tiny one, and what it calls of the vendor's ops.

A call counts once the vendor's schema took it, the vendor's Meta kernel gave the shapes and dtypes that came out, and nothing that is documented spoke against it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from sglang_npu import ragged
from sglang_npu_emulation.contract import BODIES, has_meta, watched
from torch import Tensor

from sglang_core import Engine
from sglang_core.api import ConfigError
from sglang_core.models.registry import ARCHITECTURES
from tests.models.tiny import CASES, Reference, reference

SETTINGS: dict[str, Any] = {
    "in_process": True,
    "max_running_requests": 3,
    "chunked_prefill_size": 16,
    "max_total_tokens": 1024,
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "context_length": 128,
}

ROWS = {"npu_rms_norm", "npu_add_rms_norm", "npu_format_cast"}  # weights are cast to FRACTAL_NZ
ATTENTION = {"npu_rotary_mul", "npu_scatter_pa_kv_cache", "npu_fused_infer_attention_score_v2"}
DENSE = ROWS | ATTENTION | {"npu_swiglu"}
EXPERTS = {"npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_moe_finalize_routing"}
SPARSE = DENSE | EXPERTS | {"npu_moe_gating_top_k"}
INT8 = {"npu_dynamic_quant", "npu_quant_matmul"}
INT4 = {"npu_weight_quant_batchmatmul", "npu_convert_weight_to_int4pack"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A case of tests.models.tiny, and all that its forwards call."""

    case: str
    calls: Set[str]
    changes: dict[str, Any] = field(default_factory=dict)  # of its config
    settings: dict[str, Any] = field(default_factory=dict)  # of the engine


WIDE = {"head_dim": 32}  # heads are of a multiple of 16 dims
FAMILIES = {
    "Llama 3.1": Family(case="llama31", calls=DENSE),
    "Llama 3.2": Family(case="llama32", calls=DENSE),
    "Mistral": Family(case="mistral", calls=DENSE),
    "Qwen2": Family(case="qwen2", calls=DENSE),
    "Qwen3": Family(case="qwen3-bias", calls=DENSE),
    "Phi-3": Family(case="phi3-long", calls=DENSE),
    "Gemma 3": Family(case="gemma3", calls=DENSE - {"npu_swiglu", "npu_add_rms_norm"}),
    "Mixtral": Family(case="mixtral", calls=SPARSE),
    "Qwen2-MoE": Family(case="qwen2-moe", calls=SPARSE),
    "Qwen3-MoE": Family(case="qwen3-moe-tied", calls=SPARSE),
    "Qwen3-Next": Family(
        case="qwen3-next", calls=SPARSE - {"npu_add_rms_norm"}, changes=WIDE, settings={"chunked_prefill_size": 64}
    ),  # states are computed whole for log-probabilities
    "GPT-OSS": Family(
        case="gpt-oss", calls=ROWS | ATTENTION | EXPERTS | {"npu_moe_gating_top_k_softmax_v2"}, changes=WIDE
    ),
    "DeepSeek-V2-Lite": Family(case="deepseek-v2-lite", calls=SPARSE),
    "DeepSeek-V2": Family(case="deepseek-v2", calls=DENSE | EXPERTS),  # groups of two experts are PyTorch's operators'
    "DeepSeek-V3": Family(case="deepseek-v3-neox", calls=SPARSE),
    "Llama 3.1 in int8": Family(case="llama31", calls=DENSE | INT8, settings={"quantization": "int8"}),
    "Llama 3.1 in int4": Family(case="llama31", calls=DENSE | INT4, settings={"quantization": "int4"}),
    "Qwen3-MoE in int8": Family(case="qwen3-moe-tied", calls=SPARSE | INT8, settings={"quantization": "int8"}),
    "Qwen3-MoE in int4": Family(case="qwen3-moe-tied", calls=SPARSE | INT4, settings={"quantization": "int4"}),
    "DeepSeek-V3 in int8": Family(case="deepseek-v3-neox", calls=SPARSE | INT8, settings={"quantization": "int8"}),
}
ELSEWHERE = {
    "Gemma2ForCausalLM",
    "Gemma3ForConditionalGeneration",
}  # refused, below; the text model of Gemma 3 with other names


def errors(ref: Reference, device: str, **settings: Any) -> Tensor:
    """|log-probability - transformers'| of every token of the reference's texts, in bfloat16."""
    rows = []
    with Engine(model_path=str(ref.folder), device=device, **{**SETTINGS, **settings}) as engine:
        asked = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
        answers = engine.generate(
            input_ids=[list(t) for t in ref.tokens], sampling_params=asked, return_logprob=True, logprob_start_len=0
        )
        for tokens, logits, answer in zip(ref.tokens, ref.logits, answers, strict=True):
            expected = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
            made = torch.tensor([p[0] for p in answer["meta_info"]["input_token_logprobs"][1:]])
            rows.append((made - expected).abs())
    return torch.cat(rows)


@pytest.mark.parametrize("page_size", [128, 16])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_log_probabilities_are_those_of_transformers(
    family: Family, page_size: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, as near as the reference backend comes; and it calls what is listed for the family, and no other of the vendor's ops."""
    case = CASES[family.case]
    name = f"{family.case}, widened" if family.changes else family.case
    monkeypatch.setitem(CASES, name, replace(case, changes={**case.changes, **family.changes}))
    ref = reference(name, tmp_path_factory.getbasetemp())
    settings = family.settings | {"page_size": page_size}
    theirs = errors(ref, "cpu", **settings).median()
    with watched() as calls:
        ours = errors(ref, "npu_emulated", **settings).median()
    assert ours <= 2 * theirs + 0.01, (ours, theirs)
    assert set(calls) == family.calls


def test_every_architecture_is_of_a_family() -> None:
    assert {CASES[family.case].model for family in FAMILIES.values()} == ARCHITECTURES.keys() - ELSEWHERE


def test_families_call_every_op_and_the_vendors_meta_kernel_judges_all_but_casts() -> None:
    called = {op for family in FAMILIES.values() for op in family.calls}
    assert called == set(BODIES)
    assert {op for op in called if not has_meta(op)} == {"npu_convert_weight_to_int4pack", "npu_format_cast"}


def test_prefills_of_latents_are_calls_over_packed_keys(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each layer what core expands is a call: of new tokens to each other, and of those to cached ones."""
    called: list[tuple[list[int], list[int]]] = []
    attend = ragged._attend

    def noted(q: Tensor, k: Tensor, v: Tensor, run: ragged.Run, *args: Any, **kwargs: Any) -> Any:
        assert kwargs["packed"] and q.shape[-1] == k.shape[-1] == v.shape[-1] == 128
        called.append((run.q_ends, run.k_ends))
        return attend(q, k, v, run, *args, **kwargs)

    monkeypatch.setattr(ragged, "_attend", noted)
    ref = reference("deepseek-v2-lite", tmp_path_factory.getbasetemp())
    settings = SETTINGS | {"chunked_prefill_size": 128, "page_size": 16}
    prompt = [3 + i % 97 for i in range(100)]
    with Engine(model_path=str(ref.folder), device="npu_emulated", **settings) as engine:
        for length in (40, 100):
            engine.generate(input_ids=[prompt[:length]], sampling_params={"temperature": 0, "max_new_tokens": 1})
    layers = 2
    assert called == [([40], [40])] * layers + [([68], [68]), ([68], [32])] * layers


def test_soft_caps_are_refused_by_name_and_run_on_the_definition_if_asked(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    ref = reference("gemma2", tmp_path_factory.getbasetemp())
    with pytest.raises(ConfigError, match=r"soft caps \(the vendor's op has no such argument\)"):
        errors(ref, "npu_emulated")
    theirs, ours = errors(ref, "cpu").median(), errors(ref, "npu_emulated", fallback="warn").median()
    assert ours <= 2 * theirs + 0.01, (ours, theirs)
