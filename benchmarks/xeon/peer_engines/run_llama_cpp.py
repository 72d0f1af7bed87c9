"""llama.cpp by its C interface (llama-cpp-python's bindings), as a child in its own environment.

llama.cpp divides a context's KV cells among its sequences, so each batch size has a context of its own, made in the warm-up run. Prompts
go in the library's default batches, and every sequence decodes in one batch.
"""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
from protocol import Ids, PeerEngine, serve

BATCH = 2048  # tokens a llama_decode call, the library's default
CELLS = 256  # llama.cpp rounds a sequence's cells up to this


class LlamaCpp:
    def __init__(self, job: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(job["gguf"].encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {job['gguf']}; its reason is in the log above")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = job["threads"]
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._contexts: dict[tuple[int, int], Any] = {}

    def generate(self, ids: Ids, lengths: list[int]) -> tuple[Ids, int]:
        """All answers of one length: there is no scheduler to let one end before another."""
        [length] = set(lengths)
        context = self._context(len(ids), max(map(len, ids)) + length)
        tokens = self._prefill(context, ids)
        answers = [[token] for token in tokens]
        for step in range(length - 1):
            entries = [(tokens[i], len(row) + step, i, True) for i, row in enumerate(ids)]
            self._decode(context, entries)
            tokens = [self._greedy(context, i) for i in range(len(ids))]
            for answer, token in zip(answers, tokens, strict=True):
                answer.append(token)
        return answers, 0

    def _prefill(self, context: Any, ids: Ids) -> list[int]:
        """-> the first token of each answer."""
        entries = [(token, at, i, at == len(row) - 1) for i, row in enumerate(ids) for at, token in enumerate(row)]
        first = [0] * len(ids)
        for start in range(0, len(entries), BATCH):
            part = entries[start : start + BATCH]
            self._decode(context, part)
            for place, (_, _, seq, last) in enumerate(part):
                if last:
                    first[seq] = self._greedy(context, place)
        return first

    def _decode(self, context: Any, entries: list[tuple[int, int, int, bool]]) -> None:
        """entries: (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, seq, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
        if (code := llama_cpp.llama_decode(context, batch)) != 0:
            raise RuntimeError(f"llama_decode of {len(entries)} tokens gave {code}")

    def _greedy(self, context: Any, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, place)
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def _context(self, num_seqs: int, length: int) -> Any:
        """An empty context for the shape; that of the last shape is kept, as making one is no part of what is timed."""
        cells = -(-length // CELLS) * CELLS
        key = (num_seqs, cells)
        if key not in self._contexts:
            for context in self._contexts.values():
                llama_cpp.llama_free(context)
            self._contexts.clear()
            params = llama_cpp.llama_context_default_params()
            params.n_seq_max, params.n_ctx = num_seqs, num_seqs * cells
            params.n_batch = BATCH
            params.n_threads = params.n_threads_batch = self._threads
            self._contexts[key] = llama_cpp.llama_init_from_model(self._model, params)
            if not self._contexts[key]:
                raise RuntimeError(f"no llama.cpp context for {num_seqs} sequences of {length} tokens")
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._contexts[key]), False)
        return self._contexts[key]

    def close(self) -> None:
        for context in self._contexts.values():
            llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(self._model)


def make(job: dict[str, Any]) -> PeerEngine:
    return LlamaCpp(job)


if __name__ == "__main__":
    serve(make)
