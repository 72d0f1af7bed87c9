"""sglang-core with the xeon backend, as a child. A job may carry more engine settings, {"quantization": "int8"} say."""

from __future__ import annotations

from typing import Any

from protocol import Ids, PeerEngine, serve

from sglang_core import Engine


class Ours:
    def __init__(self, job: dict[str, Any]) -> None:
        self._engine = Engine(
            model_path=job["folder"],
            device="xeon",
            dtype="bfloat16",
            context_length=job["context"],
            max_running_requests=job["max_reqs"],
            max_total_tokens=job["kv_tokens"],
            disable_radix_cache=not job["cache"],
            skip_tokenizer_init=True,
            num_threads=job["threads"],
            **job.get("settings", {}),
        )

    def generate(self, ids: Ids, lengths: list[int]) -> tuple[Ids, int]:
        sampling = [{"temperature": 0, "max_new_tokens": n, "ignore_eos": True} for n in lengths]
        answers = self._engine.generate(input_ids=ids, sampling_params=sampling)
        return [a["output_ids"] for a in answers], sum(a["meta_info"]["cached_tokens"] for a in answers)

    def close(self) -> None:
        self._engine.shutdown()


def make(job: dict[str, Any]) -> PeerEngine:
    return Ours(job)


if __name__ == "__main__":
    serve(make)
