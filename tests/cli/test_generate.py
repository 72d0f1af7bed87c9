"""`generate` with an engine that repeats what it was asked."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

import sglang_core

from .conftest import Cli


class Tokenizer:
    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        return [1, len(messages[0]["content"])]


class FakeEngine:
    made: ClassVar[list[dict[str, Any]]] = []
    asked: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **settings: Any) -> None:
        self.made.append(settings)
        self.info = SimpleNamespace(generation_defaults={"temperature": 0.7, "top_k": 20, "eos_token_id": [1]})
        self.client = SimpleNamespace(tokenizer=Tokenizer())

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.made.append({"closed": True})

    def generate(
        self, prompt: Any = None, sampling_params: Any = None, *, input_ids: Any = None, stream: bool = False
    ) -> Any:
        self.asked.append({"prompt": prompt, "input_ids": input_ids, "sampling_params": sampling_params})
        if stream:
            return self._stream()
        return [{"text": f"answer {i}", "output_ids": [i], "meta_info": {}} for i in range(len(prompt or input_ids))]

    def _stream(self) -> Iterator[dict[str, Any]]:
        for text in ("", "Pa", "Par", "Paris"):
            yield {"text": text}


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    monkeypatch.setattr(sglang_core, "Engine", FakeEngine, raising=False)
    monkeypatch.setattr(FakeEngine, "made", [])
    monkeypatch.setattr(FakeEngine, "asked", [])
    return FakeEngine


def test_one_prompt_streams_its_answer_once(cli: Cli, engine: type[FakeEngine]) -> None:
    outcome = cli("generate", "--model-path", "demo", "The capital of France is", "--max-new-tokens", "4")
    assert (outcome.status, outcome.out) == (0, "Paris\n")
    assert engine.asked[0]["prompt"] == "The capital of France is"
    assert engine.made[-1] == {"closed": True}


def test_sampling_is_the_flags_over_the_models_own(cli: Cli, engine: type[FakeEngine]) -> None:
    cli(
        "generate",
        "--model-path",
        "demo",
        "x",
        "--temperature",
        "0",
        "--stop",
        "a",
        "--stop",
        "b",
        "--ignore-eos",
        "--seed",
        "5",
    )
    expected = {"temperature": 0.0, "top_k": 20, "stop": ["a", "b"], "ignore_eos": True, "seed": 5}
    assert engine.asked[0]["sampling_params"] == expected


def test_settings_reach_the_engine(cli: Cli, engine: type[FakeEngine]) -> None:
    cli("generate", "--model-path", "demo", "--device", "cpu", "--page-size", "32", "x")
    made = engine.made[0]
    assert (made["model_path"], made["device"], made["page_size"], made["log_level"]) == ("demo", "cpu", 32, "error")


def test_several_prompts_are_told_apart(cli: Cli) -> None:
    assert cli("generate", "--model-path", "demo", "one", "two").out == "=== one\nanswer 0\n=== two\nanswer 1\n"


def test_json_holds_prompts_and_answers(cli: Cli) -> None:
    document = json.loads(cli("generate", "--model-path", "demo", "one", "--json").out)
    assert document == [{"prompt": "one", "text": "answer 0", "output_ids": [0], "meta_info": {}}]


def test_chat_goes_through_the_template(cli: Cli, engine: type[FakeEngine]) -> None:
    cli("generate", "--model-path", "demo", "--chat", "abc", "--json")
    assert engine.asked[0]["input_ids"] == [[1, 3]]


def test_stdin_is_one_prompt_or_a_prompt_a_line(
    cli: Cli, engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    cli("generate", "--model-path", "demo")
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    cli("generate", "--model-path", "demo", "--lines")
    assert [asked["prompt"] for asked in engine.asked] == ["one\ntwo", ["one", "two"]]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--temperature", "-1", "x"], "temperature=-1.0 must be at least 0"),
        (["--top-p", "0", "x"], "top_p=0 would leave no token"),
        ([], "no prompt: stdin is empty"),
    ],
)
def test_wrong_usage_starts_no_engine(
    cli: Cli, engine: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, argv: list[str], words: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    outcome = cli("generate", "--model-path", "demo", *argv)
    assert outcome.status == 2
    assert words in outcome.err
    assert engine.made == []
