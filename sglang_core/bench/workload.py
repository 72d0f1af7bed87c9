"""What is asked: prompts with exact lengths, the same for the same seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_core.errors import ConfigError

SAFE_VOCAB = 1000  # any model's vocabulary is larger


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One request to make. Exactly one of `input_ids` and `text` is set."""

    input_ids: list[int] | None = None
    text: str | None = None
    output_len: int

    def as_words(self) -> str:
        """Text for routes that take no ids: a word an id, so that equal ids stay equal text."""
        return self.text if self.text is not None else " ".join(f"w{token_id}" for token_id in self.input_ids or ())


def random_ids(
    num_prompts: int,
    *,
    input_len: int,
    output_len: int,
    range_ratio: float = 1.0,
    vocab_size: int = SAFE_VOCAB,
    seed: int = 0,
) -> list[Prompt]:
    """Prompts with nothing in common. Lengths are uniform in [range_ratio * length, length]."""
    rng = random.Random(seed)
    return [
        Prompt(
            input_ids=_ids(rng, _length(rng, input_len, range_ratio), vocab_size),
            output_len=_length(rng, output_len, range_ratio),
        )
        for _ in range(num_prompts)
    ]


def shared_prefix(
    num_prompts: int,
    *,
    groups: int,
    prefix_len: int,
    suffix_len: int,
    output_len: int,
    vocab_size: int = SAFE_VOCAB,
    seed: int = 0,
) -> list[Prompt]:
    """Prompts of `groups` families: `prefix_len` tokens in common, then `suffix_len` of their own; families interleave."""
    rng = random.Random(seed)
    prefixes = [_ids(rng, prefix_len, vocab_size) for _ in range(groups)]
    return [
        Prompt(input_ids=prefixes[i % groups] + _ids(rng, suffix_len, vocab_size), output_len=output_len)
        for i in range(num_prompts)
    ]


def from_file(path: str, num_prompts: int, *, output_len: int, seed: int = 0) -> list[Prompt]:
    """Prompts of a JSON-lines file or JSON list, drawn without replacement.

    An item is `{"prompt": text or ids, "output_len": n}` or ShareGPT's `{"conversations": [{"from", "value"}]}`, of which
    the first human turn is asked. Items without an output length get `output_len`. Raises ConfigError.
    """
    try:
        content = Path(path).read_text()
        items = json.loads(content) if content.lstrip().startswith("[") else list(map(json.loads, content.splitlines()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dataset-path {path} cannot be read: {error}") from None
    prompts = [prompt for item in items if (prompt := _from_item(item, output_len)) is not None]
    if len(prompts) < num_prompts:
        raise ConfigError(f"--dataset-path {path} has {len(prompts)} usable prompts; set --num-prompts to at most that")
    return random.Random(seed).sample(prompts, num_prompts)


def _from_item(item: dict[str, Any], output_len: int) -> Prompt | None:
    if "conversations" in item:
        turns = [turn["value"] for turn in item["conversations"] if turn.get("from") in ("human", "user")]
        return Prompt(text=turns[0], output_len=output_len) if turns else None
    wanted = int(item.get("output_len") or item.get("max_tokens") or output_len)
    prompt = item.get("prompt")
    if isinstance(prompt, list):
        return Prompt(input_ids=prompt, output_len=wanted)
    return Prompt(text=prompt, output_len=wanted) if prompt else None


def poisson_arrivals(num_requests: int, rate: float, seed: int = 0) -> list[float]:
    """Seconds after the start at which each request is due: a Poisson process, or all at 0 where the rate is infinite."""
    if rate == float("inf"):
        return [0.0] * num_requests
    rng, now, arrivals = random.Random(seed), 0.0, []
    for _ in range(num_requests):
        arrivals.append(now)
        now += rng.expovariate(rate)
    return arrivals


def _length(rng: random.Random, longest: int, range_ratio: float) -> int:
    return rng.randint(max(1, int(longest * range_ratio)), longest)


def _ids(rng: random.Random, length: int, vocab_size: int) -> list[int]:
    return rng.choices(range(vocab_size), k=length)
