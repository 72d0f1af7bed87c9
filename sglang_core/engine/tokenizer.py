"""`HFTokenizer`: a transformers tokenizer behind the few calls that the engine and the server make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang_core.errors import ConfigError, RequestError


class HFTokenizer:
    """Loads from a local folder. `chat_template` is Jinja text that replaces the tokenizer's own; transformers sandboxes both."""

    def __init__(self, path: Path | str, *, trust_remote_code: bool = False, chat_template: str | None = None) -> None:
        from transformers import AutoTokenizer  # heavy, and not needed to serve token ids

        try:
            self._hf: Any = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"no tokenizer in {path}: {e}; give one with --tokenizer-path, or --skip-tokenizer-init to serve token ids only"
            ) from e
        if chat_template is not None:
            self._hf.chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self._hf.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self._hf.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return text

    def chat_ids(self, messages: list[dict[str, Any]], **template_kwargs: Any) -> list[int]:
        """The prompt of a conversation. Raises RequestError where there is no template or it refuses the messages."""
        if self._hf.chat_template is None:
            raise RequestError(
                "this model's tokenizer has no chat template; start the server with --chat-template FILE or use /v1/completions",
                param="messages",
            )
        kwargs = {"add_generation_prompt": True, **template_kwargs}
        try:
            text = self._hf.apply_chat_template(messages, tokenize=False, **kwargs)
        except Exception as e:  # a template raises whatever it likes, with words for the caller
            raise RequestError(f"the chat template refuses these messages: {e}", param="messages") from e
        return self.encode(text, add_special_tokens=False)

    def id_to_token(self, token_id: int) -> str:
        """The token's text as it would be decoded alone, special tokens by their names."""
        text: str = self._hf.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes; a part of a character is decoded alone by byte-level vocabularies."""
        piece = self._hf.convert_ids_to_tokens(token_id)
        if piece is not None and all(ch in _BYTE_OF for ch in piece):
            return bytes(_BYTE_OF[ch] for ch in piece)
        if piece is not None and len(piece) == 6 and piece.startswith("<0x"):  # byte fallback of sentencepiece
            return bytes([int(piece[3:5], 16)])
        return self.id_to_token(token_id).encode()

    @property
    def eos_token_id(self) -> int | None:
        token_id: int | None = self._hf.eos_token_id
        return token_id


def _byte_alphabet() -> dict[str, int]:
    """The printable characters by which byte-level BPE writes bytes (GPT-2): itself where printable, else 256 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in printable]
    return table | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
