"""Packed weights that are kept on disk: what a start reads is what another packed, in huge pages, and their layout's name holds."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sglang_xeon import gemm, isa, library, weights
from sglang_xeon.backend import PACKED_LAYOUT, XeonBackend
from sglang_xeon.runtime import XeonRuntime
from test_huge_pages import is_advised

from sglang_core import Engine
from sglang_core.api import RuntimeContext
from sglang_core.api.ops import OPS, PackedWeight

SETTINGS = {
    "model_path": "demo",
    "device": "xeon",
    "max_total_tokens": 2048,
    "context_length": 256,
    "num_threads": 1,
    "in_process": True,
}
PROMPTS = ["The capital of France is", "One, two, three,"]
GREEDY = {"temperature": 0, "max_new_tokens": 12}
QUANTIZE = OPS["quant.quantize"].body
FORMATS = (
    *("dense.float32", "dense.bfloat16", "dense.float16", "fp8.token_channel", "fp8.block128", "int8.token_channel"),
    *("int4.awq.g128", "int4.pack.g128", "mxfp4.g32", "nvfp4.g16"),
)
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
TOKENS = [[3, 1, 4, 1, 5], [9, 2, 6]]


@pytest.fixture(autouse=True)
def one_thread_pool_is_left_as_it_was() -> Iterator[None]:
    """An engine in this process binds threads and their number."""
    threads, cpus = torch.get_num_threads(), os.sched_getaffinity(0)
    yield
    torch.set_num_threads(threads)
    os.sched_setaffinity(0, cpus)


def started(caplog: pytest.LogCaptureFixture, kept: Path, **settings: object) -> tuple[list[list[int]], str]:
    """Answers of an engine -> them, and what it logged of its packed weights."""
    caplog.clear()
    with caplog.at_level(logging.INFO), Engine(**SETTINGS | settings, packed_cache=str(kept)) as engine:
        if settings.get("skip_tokenizer_init"):
            answers = engine.generate(input_ids=TOKENS, sampling_params=GREEDY)
        else:
            answers = engine.generate(PROMPTS, GREEDY)
    told = " ".join(r.getMessage() for r in caplog.records if r.getMessage().startswith("packed weights"))
    return [answer["output_ids"] for answer in answers], told


@pytest.mark.parametrize("quantization", [None, "fp8", "int8", "int4"])
@pytest.mark.parametrize("model", ["demo", "moe"])
def test_an_engine_that_reads_packed_weights_answers_as_the_one_that_packed_them(
    model: str, quantization: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, object] = {"quantization": quantization}
    if model == "moe":
        (tmp_path / "config.json").write_text(json.dumps(MOE))
        settings |= {"model_path": str(tmp_path), "load_format": "dummy", "skip_tokenizer_init": True}
    first, told = started(caplog, tmp_path / "kept", **settings)
    assert " written to " in told and " read from " not in told
    second, told = started(caplog, tmp_path / "kept", **settings)
    assert " read from " in told and " written to " not in told
    assert second == first


def test_what_is_read_lies_in_huge_pages() -> None:
    (info,) = XeonBackend().probe()
    runtime = XeonRuntime(RuntimeContext(devices=(info,), num_threads=1))
    memory = runtime.alloc_packed(5 * 2**20)
    assert (memory.dtype, memory.shape) == (torch.uint8, (5 * 2**20,)) and is_advised(memory)
    runtime.close()


# Of the bytes that `pack` makes of `weight` below. Where they change, so must PACKED_LAYOUT: caches of old bytes go by it.
BYTES = {
    "xeon.panels/3": {
        "dense.float32": "0055e0a99ac9a6a2",
        "dense.bfloat16": "29db7520aed33391",  # plain
        "dense.bfloat16, coded": "d9a674f9cad8e1e2",
        "dense.float16": "824ae2e6a084dffc",
        "fp8.token_channel": "a7aa582ad30d808e",
        "fp8.block128": "d1840af0beb73ee6",
        "int8.token_channel": "cffda7d67c37eea4",
        "int4.awq.g128": "0e372aecbd836343",
        "int4.pack.g128": "609c00e4744c7763",
        "mxfp4.g32": "0d3d98d830de819e",
        "nvfp4.g16": "fb7158baacaf5254",
    }
}


def weight(fmt: str) -> PackedWeight:
    """32 x 256 numbers that are the same on every machine: no generator, no rounding."""
    numbers = ((torch.arange(32 * 256) * 7919 % 4093 - 2046).float() / 512).view(32, 256)
    if fmt.startswith("dense"):
        dtype = getattr(torch, fmt.removeprefix("dense."))
        return PackedWeight("dense", {"weight": numbers.to(dtype)}, out_features=32, in_features=256)
    return QUANTIZE(numbers, fmt)


def digest(w: PackedWeight) -> str:
    made = hashlib.blake2b(digest_size=8)
    for name, x in sorted(w.named_buffers()):
        made.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        made.update(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


def test_the_name_of_the_layout_stands_for_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MOST_ESCAPES", 1.0)
    monkeypatch.setattr(library, "level", lambda: "avx512_bf16")
    made = {"dense.bfloat16, coded": digest(gemm.pack(weight("dense.bfloat16")))}
    monkeypatch.setenv(isa.ENV_BF16, "plain")
    made |= {fmt: digest(gemm.pack(weight(fmt))) for fmt in FORMATS}
    assert {PACKED_LAYOUT: made} == BYTES, (
        "other bytes: give PACKED_LAYOUT in backend.py a new number, and the digests here"
    )
