"""vLLM's CPU build, as a child in its own environment. Its environment variables are set by the parent (engines.py)."""

from __future__ import annotations

from typing import Any

from protocol import Ids, PeerEngine, serve


class Vllm:
    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(
            model=job["folder"],
            dtype="bfloat16",
            max_model_len=job["context"],
            max_num_seqs=job["max_reqs"],
            enable_prefix_caching=job["cache"],
            enforce_eager=job["eager"],
            skip_tokenizer_init=True,
            seed=0,
        )

    def generate(self, ids: Ids, lengths: list[int]) -> tuple[Ids, int]:
        params = [self._params(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]
        prompts = [{"prompt_token_ids": row} for row in ids]
        answers = self._llm.generate(prompts, params, use_tqdm=False)
        return [list(a.outputs[0].token_ids) for a in answers], sum(a.num_cached_tokens or 0 for a in answers)

    def close(self) -> None:
        del self._llm


def make(job: dict[str, Any]) -> PeerEngine:
    return Vllm(job)


if __name__ == "__main__":
    serve(make)
