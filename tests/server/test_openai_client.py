"""The real `openai` client against a running server: the fake engine, then the demo model."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from tests.server.fake_client import FakeClient
from tests.server.live import serving

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def fake_url() -> Iterator[str]:
    with serving(FakeClient()) as live:
        yield live.url


@pytest.fixture(scope="module", params=["fake", "engine"])
def base_url(request: pytest.FixtureRequest) -> str:
    """A server's root, once over the fake and once over the demo model."""
    if request.param == "fake":
        return str(request.getfixturevalue("fake_url"))
    return str(request.getfixturevalue("live_server").url)


@pytest.fixture(scope="module")
def api(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=60) as api:
        yield api


@pytest.fixture(scope="module")
def model(api: OpenAI) -> str:
    return api.models.list().data[0].id


def test_models(api: OpenAI, model: str) -> None:
    assert api.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as refusal:
        api.models.retrieve("other")
    assert refusal.value.code == "model_not_found"


def test_chat(api: OpenAI, model: str) -> None:
    reply = api.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    choice = reply.choices[0]
    assert "Paris" in choice.message.content
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert reply.model == model
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens <= reply.usage.prompt_tokens
    assert type(reply).model_validate(reply.model_dump(), strict=True) == reply


def test_chat_stream_says_what_chat_says(api: OpenAI, model: str) -> None:
    whole = api.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    chunks = list(
        api.chat.completions.create(
            model=model, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_the_stream_helper_understands_our_stream(api: OpenAI, model: str) -> None:
    with api.chat.completions.stream(model=model, messages=QUESTION, temperature=0) as stream:
        final = stream.get_final_completion()
    assert "Paris" in final.choices[0].message.content


def test_chat_logprobs(api: OpenAI, model: str) -> None:
    reply = api.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=3, max_completion_tokens=4
    )
    content = reply.choices[0].logprobs.content
    assert len(content) == 4 == reply.usage.completion_tokens
    assert b"".join(bytes(token.bytes) for token in content).decode() == reply.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs) <= 0  # greedy


def test_chat_stream_logprobs(api: OpenAI, model: str) -> None:
    chunks = list(
        api.chat.completions.create(
            model=model, messages=QUESTION, temperature=0, logprobs=True, max_completion_tokens=4, stream=True
        )
    )
    tokens = [t.token for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert "".join(tokens) == "".join(c.choices[0].delta.content or "" for c in chunks)
    assert len(tokens) == 4


def test_n_answers(api: OpenAI, model: str) -> None:
    reply = api.chat.completions.create(model=model, messages=QUESTION, n=3, max_tokens=5, seed=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert reply.usage.completion_tokens <= 15
    chunks = list(api.chat.completions.create(model=model, messages=QUESTION, n=3, max_tokens=5, seed=1, stream=True))
    streamed = dict.fromkeys(range(3), "")
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == {choice.index: choice.message.content for choice in reply.choices}


def test_a_seed_repeats_itself(api: OpenAI, model: str) -> None:
    ask = {"model": model, "messages": QUESTION, "seed": 7, "temperature": 1.5, "max_tokens": 12}
    first, second = api.chat.completions.create(**ask), api.chat.completions.create(**ask)
    assert first.choices[0].message.content == second.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_answer_and_are_cut(api: OpenAI, model: str, stream: bool) -> None:
    whole = api.chat.completions.create(model=model, messages=QUESTION, temperature=0).choices[0].message.content
    stop = whole[6:9]
    reply = api.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, stop=["\x00", stop], stream=stream
    )
    if stream:
        chunks = list(reply)
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        finish = chunks[-1].choices[0]
    else:
        text, finish = reply.choices[0].message.content, reply.choices[0]
    assert text == whole[: whole.index(stop)]
    assert finish.finish_reason == "stop"
    assert finish.matched_stop == stop


def test_text_parts(api: OpenAI, model: str) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    reply = api.chat.completions.create(model=model, messages=parts, temperature=0)
    assert "Paris" in reply.choices[0].message.content


def test_max_tokens_ends_by_length(api: OpenAI, model: str) -> None:
    reply = api.chat.completions.create(model=model, messages=QUESTION, max_tokens=2, extra_body={"ignore_eos": True})
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 2)


def test_completions_have_sixteen_tokens_by_default(api: OpenAI, model: str) -> None:
    reply = api.completions.create(model=model, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert reply.usage.completion_tokens == 16
    assert type(reply).model_validate(reply.model_dump(), strict=True) == reply


def test_completions_of_texts_and_ids(api: OpenAI, model: str) -> None:
    ids = api.post("/../tokenize", body={"prompt": PROMPT}, cast_to=dict[str, object])["tokens"]
    ask = {"model": model, "temperature": 0, "max_tokens": 4}
    one = api.completions.create(prompt=PROMPT, **ask).choices[0].text
    assert api.completions.create(prompt=ids, **ask).choices[0].text == one
    assert [c.text for c in api.completions.create(prompt=[PROMPT, PROMPT], **ask).choices] == [one, one]
    assert [c.text for c in api.completions.create(prompt=[ids, ids], n=2, **ask).choices] == [one] * 4
    streamed = {0: "", 1: ""}
    for chunk in api.completions.create(prompt=[PROMPT, ids], stream=True, **ask):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == {0: one, 1: one}


def test_echo_with_logprobs_scores_the_prompt(api: OpenAI, model: str) -> None:
    reply = api.completions.create(model=model, prompt=PROMPT, echo=True, logprobs=2, max_tokens=1, temperature=0)
    choice = reply.choices[0]
    scored = choice.logprobs
    assert choice.text.startswith(PROMPT)
    assert len(scored.tokens) == reply.usage.prompt_tokens + 1 == len(scored.text_offset)
    assert scored.token_logprobs[0] is None and scored.top_logprobs[0] is None
    assert all(logprob <= 0 for logprob in scored.token_logprobs[1:])
    assert all(2 <= len(top) <= 3 for top in scored.top_logprobs[1:])
    for token, start in zip(scored.tokens, scored.text_offset, strict=True):
        assert choice.text[start:].startswith(token)
    alone = api.completions.create(model=model, prompt=PROMPT, echo=True, logprobs=2, max_tokens=0)
    assert alone.choices[0].text == PROMPT
    assert alone.choices[0].logprobs.token_logprobs[1:] == pytest.approx(scored.token_logprobs[1:-1], abs=0.05)


def test_streamed_echo_begins_with_the_prompt(api: OpenAI, model: str) -> None:
    ask = {"model": model, "prompt": PROMPT, "echo": True, "logprobs": 0, "max_tokens": 3, "temperature": 0}
    whole = api.completions.create(**ask).choices[0]
    chunks = list(api.completions.create(stream=True, **ask))
    assert "".join(c.choices[0].text for c in chunks) == whole.text
    assert [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens] == whole.logprobs.tokens


def test_errors_reach_the_client_as_its_own(api: OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        api.chat.completions.create(model=model, messages=QUESTION, temperature=-1)
    assert refusal.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as refusal:
        api.chat.completions.create(model=model, messages=QUESTION, max_tokens=10**6)
    assert refusal.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(model="gpt-4", messages=QUESTION)


def test_the_request_id_is_that_of_the_answer(api: OpenAI, model: str) -> None:
    reply = api.chat.completions.create(model=model, messages=QUESTION, max_tokens=1, extra_body={"rid": "mine"})
    assert reply.id == reply._request_id == "mine"


async def test_many_clients_at_once(base_url: str, model: str) -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=60) as api:
        asks = [api.chat.completions.create(model=model, messages=QUESTION, temperature=0) for _ in range(12)]
        replies = await asyncio.gather(*asks)
    assert all("Paris" in reply.choices[0].message.content for reply in replies)
