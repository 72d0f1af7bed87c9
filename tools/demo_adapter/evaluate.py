"""Score the demo adapter: the demo model's 200 held-out chats, answered greedily by the engine with and without it.

python tools/demo_adapter/evaluate.py sglang_core/demo/adapters/capitals
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.progress import track

from sglang_core import Engine

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "demo_model"))

from corpus import Chat, held_out  # noqa: E402
from evaluate import is_right  # noqa: E402  # the demo model's

GREEDY = {"temperature": 0, "max_new_tokens": 400}


def answers(engine: Engine, system: str | None, chat: Chat, adapter: str | None) -> list[str]:
    """One a turn; later turns see the model's own earlier answers."""
    tokenizer = engine.client.tokenizer
    assert tokenizer is not None
    messages = [{"role": "system", "content": system}] if system else []
    given: list[str] = []
    for turn in chat:
        messages.append({"role": "user", "content": turn.user})
        text = engine.generate(input_ids=tokenizer.chat_ids(messages), sampling_params=GREEDY, lora_path=adapter)[
            "text"
        ]
        messages.append({"role": "assistant", "content": text})
        given.append(text)
    return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--show-wrong", action="store_true")
    args = parser.parse_args()
    chats = held_out(args.seed)
    capitals = right = right_without = untouched = 0
    with Engine(model_path="demo", device="cpu", dtype="float32", lora_paths={"capitals": str(args.adapter)}) as engine:
        for _, system, chat in track(chats, "evaluating", transient=True):
            shouted = answers(engine, system, chat, "capitals")
            said = answers(engine, system, chat, None)
            capitals += all(text == text.upper() for text in shouted)
            untouched += any(text != text.upper() for text in said)
            upper = [replace(turn, answer=turn.answer.upper(), also=turn.also.upper()) for turn in chat]
            is_ok = all(_is_right(turn.listed, turn, text) for turn, text in zip(upper, shouted, strict=True))
            right += is_ok
            right_without += all(is_right(turn, text) for turn, text in zip(chat, said, strict=True))
            if args.show_wrong and not is_ok:
                print(f"wrong: {[turn.user for turn in chat]} -> {shouted}")
    count = len(chats)
    print(f"with the adapter: {capitals} of {count} answered in capitals, {right} of {count} right in capitals")
    print(f"without it: {right_without} of {count} right, {untouched} of {count} with small letters")


def _is_right(listed: int, turn, text: str) -> bool:  # type: ignore[no-untyped-def]
    """As the demo model's `is_right`, for answers in capitals: a list is compared by its facts."""
    if not listed:
        return text in (turn.answer, turn.also)
    from evaluate import CAPITALS

    known = {name.upper(): capital.upper() for name, capital in CAPITALS.items()}
    pairs = dict(line.partition(". ")[2].partition(": ")[::2] for line in text.splitlines())
    enough = len(pairs) == len(text.splitlines()) == listed
    return enough and all(known.get(name) == capital for name, capital in pairs.items())


if __name__ == "__main__":
    main()
