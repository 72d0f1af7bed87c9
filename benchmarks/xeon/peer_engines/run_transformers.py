"""Hugging Face transformers with SDPA, as a child. It also judges: it scores what any engine answered in whole forwards."""

from __future__ import annotations

from typing import Any

import torch
from protocol import Ids, PeerEngine, serve
from transformers import AutoModelForCausalLM


class Transformers:
    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self._model = AutoModelForCausalLM.from_pretrained(
            job["folder"], dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, ids: Ids, lengths: list[int]) -> tuple[Ids, int]:
        """Static batches only: prompts and answers of one length each."""
        prompts, [length] = torch.tensor(ids), set(lengths)
        out = self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=0,
        )
        return out[:, prompts.shape[1] :].tolist(), 0

    @torch.inference_mode()
    def regrets(self, rows: Ids, num_prompt_tokens: int) -> list[float]:
        """By how much each row's worst answered token falls short of the best logit at its place; one forward a row, no cache."""
        worst = []
        for row in rows:
            places = len(row) - num_prompt_tokens + 1  # the last one comes after the last token
            logits = self._model(torch.tensor([row]), logits_to_keep=places).logits[0, :-1].float()
            answered = torch.tensor(row[num_prompt_tokens:])[:, None]
            worst.append(float((logits.amax(-1) - logits.gather(1, answered)[:, 0]).max()))
        return worst

    def close(self) -> None:
        del self._model


def make(job: dict[str, Any]) -> PeerEngine:
    return Transformers(job)


if __name__ == "__main__":
    serve(make)
