"""Score a demo checkpoint: 200 chats in phrasings that training never used, answered greedily.

    python tools/demo_model/evaluate.py sglang_core/demo [--phrasings final] [--show-wrong]

A chat is right when every answer equals an expected one to the letter; for lists of countries, when the asked number
of different countries comes with the right capitals. The stored bf16 weights are evaluated in float32 arithmetic.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from corpus import Chat, Turn, held_out
from facts import COUNTRIES
from phrasings import FINAL, HELD_OUT
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

CAPITALS = {country.name: country.capital for country in COUNTRIES}
NAMED_QUESTIONS = (
    Turn("What is the capital of France?", "The capital of France is Paris."),
    Turn("List 3 countries and their capitals.", "", listed=3),
)


def is_right(turn: Turn, answer: str) -> bool:
    if not turn.listed:
        return answer in (turn.answer, turn.also)
    pairs = dict(line.partition(". ")[2].partition(": ")[::2] for line in answer.splitlines())
    enough = len(pairs) == len(answer.splitlines()) == turn.listed
    return enough and all(CAPITALS.get(name) == capital for name, capital in pairs.items())


class Answerer:
    """Greedy answers of one checkpoint."""

    def __init__(self, path: Path) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def __call__(self, messages: list[dict[str, str]]) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=160, do_sample=False)
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def first_wrong(answerer: Answerer, system: str | None, chat: Chat) -> tuple[Turn, str] | None:
    """The first turn answered wrong and its answer; later turns see the model's own earlier answers."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in chat:
        messages.append({"role": "user", "content": turn.user})
        answer = answerer(messages)
        if not is_right(turn, answer):
            return turn, answer
        messages.append({"role": "assistant", "content": answer})
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--phrasings", choices=("held-out", "final"), default="held-out")
    parser.add_argument("--show-wrong", action="store_true")
    args = parser.parse_args()
    answerer = Answerer(args.checkpoint)
    phrasings = {"held-out": HELD_OUT, "final": FINAL}[args.phrasings]

    rights: dict[str, list[bool]] = defaultdict(list)
    wrongs = []
    for topic, system, chat in track(held_out(args.seed, phrasings), "evaluating", transient=True):
        wrong = first_wrong(answerer, system, chat)
        rights[topic].append(wrong is None)
        wrongs += [wrong] if wrong else []

    print("| topic | right | of |\n|---|---|---|")
    for topic, marks in rights.items():
        print(f"| {topic} | {sum(marks)} | {len(marks)} |")
    total = sum(map(sum, rights.values()))
    count = sum(map(len, rights.values()))
    print(f"| total | {total} ({total / count:.1%}) | {count} |\n")
    for turn in NAMED_QUESTIONS:
        answer = answerer([{"role": "user", "content": turn.user}])
        print(f"{'right' if is_right(turn, answer) else 'WRONG'}: {turn.user} -> {answer!r}")
    for turn, answer in wrongs if args.show_wrong else []:
        print(f"wrong: {turn.user!r} -> {answer!r}, expected {turn.answer!r}")


if __name__ == "__main__":
    main()
