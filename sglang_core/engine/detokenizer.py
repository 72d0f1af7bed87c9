"""Token ids to text as they come, and stop strings found in that text."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_core.engine.requests import Tokenizer
from sglang_core.types import SamplingParams

REPLACEMENT = "\ufffd"  # what a decoder puts for a character whose last bytes are still to come
MAX_HELD = 16  # tokens; no character is spread over so many, and each new one decodes all of them again


class IncrementalDecoder:
    """Decodes a growing list of ids into text that is never taken back.

    Decodes from a little before the news, since a token's text may depend on its left neighbours, and gives what is new.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._context: list[int] = []  # given out last, decoded again as left context
        self._context_text = ""
        self._held: list[int] = []  # not given out yet

    def push(self, token_id: int) -> str:
        """The text that became certain with this token, often empty in the middle of a character."""
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        if len(text) > len(self._context_text) and (not text.endswith(REPLACEMENT) or len(self._held) > MAX_HELD):
            return self._give_out(text)
        if len(self._held) > MAX_HELD:
            self._held.clear()  # special tokens that are skipped: no text will come of them
        return ""

    def flush(self) -> str:
        """What is left at the end, replacement characters included."""
        return self._give_out(self._decode(self._context + self._held))

    def _give_out(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._context, self._held = self._held, []
        self._context_text = self._decode(self._context)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string was completed by output token `num_tokens`."""

    matched: str
    num_tokens: int


class TextStream:
    """The text of one answer: decodes, holds back what could become a stop string, cuts at the first that is complete."""

    def __init__(self, tokenizer: Tokenizer, sampling: SamplingParams) -> None:
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=sampling.skip_special_tokens)
        self._stops, self._keep_stop = sampling.stop, sampling.no_stop_trim
        self._min_new_tokens = sampling.min_new_tokens
        self._held = ""  # decoded, but may be the beginning of a stop string
        self.num_tokens = 0

    def push(self, token_ids: list[int]) -> tuple[str, StopMatch | None]:
        """-> (text that may be shown, the stop string met). Tokens after the one that completes a stop are not looked at."""
        shown = ""
        for token_id in token_ids:
            self.num_tokens += 1
            self._held += self._decoder.push(token_id)
            if (stop := self._first_stop()) is not None:
                return shown + self._cut(stop), StopMatch(stop, self.num_tokens)
            keep = self._possible_stop_length()
            shown += self._held[: len(self._held) - keep]
            self._held = self._held[len(self._held) - keep :]
        return shown, None

    def finish(self) -> tuple[str, StopMatch | None]:
        """The rest of the text, once the engine has ended the req."""
        self._held += self._decoder.flush()
        if (stop := self._first_stop()) is not None:
            return self._cut(stop), StopMatch(stop, self.num_tokens)
        return self._held, None

    def _first_stop(self) -> str | None:
        if not self._stops or self.num_tokens < self._min_new_tokens:
            return None
        met = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        return min(met)[1] if met else None

    def _cut(self, stop: str) -> str:
        end = self._held.find(stop) + (len(stop) if self._keep_stop else 0)
        return self._held[:end]

    def _possible_stop_length(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
