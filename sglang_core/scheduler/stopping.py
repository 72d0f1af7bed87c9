"""When a req ends, as far as ids tell. Stop strings are the detokenizer's, which calls `Scheduler.finish_at`."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_core.types import FinishReason, Req


def accept(req: Req, token_ids: Sequence[int]) -> tuple[int, FinishReason | None]:
    """Append tokens to the req's output up to the one that ends it. How many were taken, and how it ended, if it did.

    An end by length means that later tokens are dropped, as does a stop id, which itself is kept.
    """
    output, stop_ids = req.output_ids, req.stop_ids
    before, room = len(output), req.max_len - len(req.input_ids)
    for token in token_ids:
        output.append(token)
        if token in stop_ids and len(output) > req.sampling.min_new_tokens:
            return len(output) - before, FinishReason("stop", matched=token)
        if len(output) >= room:
            return len(output) - before, FinishReason("length")
    return len(token_ids), None


def truncate(req: Req, num_output_tokens: int) -> None:
    """Forget output tokens past a count, and that their KV was computed."""
    del req.output_ids[num_output_tokens:]
    req.committed_len = min(req.committed_len, req.num_tokens)
