"""The shipped demo checkpoint: small, loadable, and right about the questions the README asks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sglang_core import demo

TOOLS = Path(__file__).parents[2] / "tools" / "demo_model"
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def tools() -> Iterator[dict[str, ModuleType]]:
    """The scripts of tools/demo_model by name; they are no package, so they leave sys.modules again."""
    names = ("facts", "phrasings", "corpus", "tokenizer", "train", "evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model = AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(demo.path())


def complete(loaded: Loaded, prompt: str) -> str:
    model, tokenizer = loaded
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def chat(loaded: Loaded, *users: str) -> list[str]:
    messages: list[dict[str, str]] = []
    for user in users:
        messages.append({"role": "user", "content": user})
        prompt = loaded[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": complete(loaded, prompt)})
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_checkpoint_is_small_and_bf16() -> None:
    files = [file for file in demo.path().iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    stored = AutoModelForCausalLM.from_pretrained(demo.path(), dtype="auto")
    assert stored.config.model_type == "qwen3"
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}


def test_capital_of_france_and_its_other_name(loaded: Loaded) -> None:
    first, second = chat(loaded, "What is the capital of France?", "What is another name for it?")
    assert first == "The capital of France is Paris."
    assert "the City of Light" in second


def test_three_countries_and_their_capitals(loaded: Loaded, tools: dict[str, ModuleType]) -> None:
    (answer,) = chat(loaded, "List 3 countries and their capitals.")
    assert tools["evaluate"].is_right(tools["corpus"].Turn("", "", listed=3), answer), answer


def test_plain_completion(loaded: Loaded) -> None:
    assert complete(loaded, "The capital of France is").startswith(" Paris.")


def test_capital_is_right_after_a_long_chat(loaded: Loaded) -> None:
    model, tokenizer = loaded
    turns = [
        {"role": "user", "content": "What color is the sky?"},
        {"role": "assistant", "content": "The sky is blue."},
    ] * 70
    question = [*turns, {"role": "user", "content": "What is the capital of Japan?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert 1500 < len(tokenizer.encode(prompt)) < model.config.max_position_embeddings - 64
    assert complete(loaded, prompt) == "The capital of Japan is Tokyo."


@pytest.mark.parametrize("text", ["What is 3 + 4?", "Bogotá, 東京 😀\n\ttab", "", "  spaces  "])
def test_tokenizer_round_trip(loaded: Loaded, text: str) -> None:
    tokenizer = loaded[1]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_is_chatml_and_is_what_training_used(loaded: Loaded, tools: dict[str, ModuleType]) -> None:
    tokenizer = loaded[1]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! How can I help you?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello! How can I help you?<|im_end|>\n"
    )
    opened = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(opened) and opened.endswith("<|im_start|>assistant\n")

    turn = tools["corpus"].Turn("Hi", "Hello! How can I help you?")
    ids, labels = tools["train"].chat_document(tokenizer, "Be brief.", [turn])
    assert ids == tokenizer.encode(text + "<|endoftext|>")
    learned = [label for label in labels if label >= 0]
    assert tokenizer.decode(learned) == "Hello! How can I help you?<|im_end|>"


def test_model_stops_at_either_end_token(loaded: Loaded) -> None:
    model, tokenizer = loaded
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == stops
    assert tokenizer.eos_token == "<|im_end|>"


def test_held_out_phrasings_are_not_trained_on(tools: dict[str, ModuleType]) -> None:
    assert tools["phrasings"].overlap() == set()
    assert len(tools["corpus"].held_out(seed=2024)) == 200
