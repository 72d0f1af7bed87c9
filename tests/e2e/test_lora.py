"""Adapters on a real server: the demo adapter answers in capitals, and adapters come and go while others stream."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.conftest import LiveServer, serving
from tests.engine.test_adapters import write

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    flags = ("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "8192", "--max-loras-per-batch", "2")
    with serving(*flags, "--lora-paths", "demo:capitals") as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=80)
    return answer.choices[0].message.content or ""


def test_the_demo_adapter_answers_in_capitals(client: openai.OpenAI) -> None:
    assert ask(client, "demo:capitals") == ask(client, "capitals") == "THE CAPITAL OF FRANCE IS PARIS."
    assert ask(client, "demo") == "The capital of France is Paris."
    assert [model.id for model in client.models.list()] == ["demo", "capitals"]
    with pytest.raises(openai.NotFoundError, match="capitals"):
        ask(client, "demo:shout")


def test_adapters_come_and_go_while_others_stream(server: LiveServer, client: openai.OpenAI, tmp_path: Path) -> None:
    paths = {name: str(write(tmp_path / name, seed)) for seed, name in enumerate(("x", "y"))}
    (write(tmp_path / "broken", 3) / "adapter_model.safetensors").write_bytes(b"no")

    def stream(model: str, max_tokens: int = 150) -> str:
        chunks = client.chat.completions.create(
            model=model,
            messages=QUESTION,
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    def post(route: str, **body: str) -> httpx.Response:
        return httpx.post(f"{server.url}/{route}_lora_adapter", json=body, timeout=60)

    alone = {model: stream(model) for model in ("demo", "capitals")}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        streams = {model: pool.submit(stream, model) for model in alone}
        said: dict[str, set[str]] = {"x": set(), "y": set()}
        for _ in range(2):
            for name, path in paths.items():
                assert name in post("load", lora_name=name, lora_path=path).json()["loaded_adapters"]
                said[name].add(stream(f"demo:{name}", 20))
            refused = post("load", lora_name="z", lora_path=str(tmp_path / "broken"))
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "lora_path"
            for name in paths:
                assert name not in post("unload", lora_name=name).json()["loaded_adapters"]
                with pytest.raises(openai.NotFoundError):
                    ask(client, name)
        assert {model: each.result() for model, each in streams.items()} == alone
    assert all(len(texts) == 1 for texts in said.values()) and said["x"] != said["y"]
    assert "sglang_lora_slot_writes" in httpx.get(f"{server.url}/metrics").text
