"""Log-probabilities as OpenAI's two endpoints show them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from sglang_core.engine.requests import Tokenizer
from sglang_core.server.openai_types import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    TopLogprob,
)
from sglang_core.types import TokenLogprobs

LOWEST = -9999.0  # JSON has no infinity


class TokenTexts:
    """The bytes of tokens, looked up once each."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        return known

    def text_of(self, token_id: int, escape_prefix: str = "") -> str:
        """The token's text; where its bytes are part of a character, the bytes in escaped form."""
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        data = self.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return escape_prefix + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokens: Sequence[TokenLogprobs], texts: TokenTexts, top: int) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                token=texts.text_of(token.token_id),
                logprob=_finite(token.logprob),
                bytes=list(texts.bytes_of(token.token_id)),
                top_logprobs=[
                    TopLogprob(token=texts.text_of(i), logprob=_finite(lp), bytes=list(texts.bytes_of(i)))
                    for i, lp in zip(token.top_ids[:top], token.top_logprobs[:top], strict=True)
                ],
            )
            for token in tokens
        ]
    )


class CompletionLogprobsWriter:
    """The legacy four-list form. Keeps the text offset from chunk to chunk of one answer."""

    def __init__(self, texts: TokenTexts, top: int, offset: int = 0) -> None:
        self._texts, self._top = texts, top
        self._offset = offset  # characters of the answer's text before the next token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, tokens: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        out = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in tokens:
            name = self._texts.text_of(token.token_id, "bytes:")
            out.tokens.append(name)
            out.text_offset.append(self._offset)
            out.token_logprobs.append(None if token.logprob is None else _finite(token.logprob))
            out.top_logprobs.append(self._alternatives(token, name))
            self._offset += len(self._decoder.decode(self._texts.bytes_of(token.token_id)))
        return out

    def _alternatives(self, token: TokenLogprobs, name: str) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        pairs = zip(token.top_ids[: self._top], token.top_logprobs[: self._top], strict=True)
        best = {self._texts.text_of(i, "bytes:"): _finite(lp) for i, lp in pairs}
        return best if name in best else best | {name: _finite(token.logprob)}


def _finite(logprob: float | None) -> float:
    return LOWEST if logprob is None or not logprob > LOWEST else logprob
