"""Who answers in `chat`: a server over HTTP, or an engine of this command's own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol, cast

from sglang_core.cli.sampling_flags import with_model_defaults
from sglang_core.errors import EngineDeadError, RequestError

if TYPE_CHECKING:
    import httpx

    from sglang_core.config import EngineConfig
    from sglang_core.engine.requests import Client, GenerateChunk

Message = dict[str, str]
REPLY_TOKENS = 1024  # unless --max-new-tokens says otherwise


class Talker(Protocol):
    name: str  # of the model

    def answer(self, messages: list[Message]) -> AsyncGenerator[str, None]:
        """New pieces of text. Closing the iterator aborts the request."""

    async def close(self) -> None: ...


class HttpTalker:
    """Asks /v1/chat/completions of any OpenAI-compatible server."""

    def __init__(self, client: httpx.AsyncClient, model: str, sampling: Mapping[str, Any]) -> None:
        self._client, self.name = client, model
        body = {"max_tokens": REPLY_TOKENS, **sampling}
        if "max_new_tokens" in body:
            body["max_tokens"] = body.pop("max_new_tokens")
        self._body = {"model": model, "stream": True, **body}

    @classmethod
    async def connect(cls, url: str, api_key: str | None, sampling: Mapping[str, Any]) -> HttpTalker:
        """Raises BenchError where no server answers."""
        from sglang_core.bench.serve import Target, find_model, open_client

        client = open_client(Target(base_url=url.rstrip("/").removesuffix("/v1"), api_key=api_key))
        try:
            return cls(client, await find_model(client), sampling)
        except BaseException:
            await client.aclose()
            raise

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str, None]:
        import httpx

        from sglang_core.bench.routes import server_events

        try:
            async with self._client.stream(
                "POST", "/v1/chat/completions", json={**self._body, "messages": messages}
            ) as response:
                if not response.is_success:
                    text = (await response.aread()).decode(errors="replace")
                    raise RequestError(f"the server answers {response.status_code}: {text}")
                async for event in server_events(response.aiter_bytes()):
                    if "error" in event:
                        raise RequestError(str(event["error"]))
                    for choice in event.get("choices") or ():
                        if content := (choice.get("delta") or {}).get("content"):
                            yield content
        except httpx.HTTPError as error:
            raise EngineDeadError(f"{self._client.base_url}: {type(error).__name__} {error}") from None

    async def close(self) -> None:
        await self._client.aclose()


class EngineTalker:
    """Asks an engine that lives as long as the chat."""

    def __init__(self, client: Client, sampling: Mapping[str, Any]) -> None:
        from sglang_core.engine.native import parse_sampling_params

        self._client, self.name = client, client.info.served_model_name
        chosen = with_model_defaults(sampling, client.info.generation_defaults)
        self._sampling = parse_sampling_params({"max_new_tokens": REPLY_TOKENS, **chosen})

    @classmethod
    async def start(cls, config: EngineConfig, sampling: Mapping[str, Any]) -> EngineTalker:
        from sglang_core.engine.replicas import start_client

        return cls(await start_client(config), sampling)

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str, None]:
        import msgspec

        from sglang_core.engine.requests import GenerateRequest

        if self._client.tokenizer is None:
            raise RequestError("chat needs the tokenizer; drop --skip-tokenizer-init")
        ids = self._client.tokenizer.chat_ids([dict(message) for message in messages])
        room = self._client.info.context_length - len(ids)
        if room < 1:
            raise RequestError(
                f"the conversation has {len(ids)} tokens and the context {self._client.info.context_length}; /reset it"
            )
        sampling = msgspec.structs.replace(self._sampling, max_new_tokens=min(room, self._sampling.max_new_tokens))
        answer = self._client.generate(GenerateRequest(input_ids=ids, sampling=sampling))
        async with aclosing(cast("AsyncGenerator[GenerateChunk, None]", answer)) as chunks:
            async for chunk in chunks:
                yield chunk.text

    async def close(self) -> None:
        await self._client.close()
