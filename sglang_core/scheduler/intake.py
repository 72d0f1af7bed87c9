"""What a req must be to be taken in, and the facts about it that are settled then."""

from __future__ import annotations

from sglang_core.errors import QueueFullError, RequestError
from sglang_core.scheduler.chunked_prefill import logprob_start
from sglang_core.scheduler.config import SchedulerConfig
from sglang_core.types import Req

SEED_MASK = 0x7FFF_FFFF  # seeds are non-negative int32
SEED_STRIDE = 1_000_003  # keeps the seeds of neighbouring random_seed values apart


def check(
    req: Req,
    config: SchedulerConfig,
    num_waiting: int,
    num_free_slots: int,
    pool_tokens: int,
    largest_chunk: int,
    encoder_tokens: int,
) -> None:
    """Raise for a req that could never run, or that finds the queue full. The message says what would help.

    The next step takes a waiting req into each free slot: those do not count against the queue.
    """
    n = len(req.input_ids)
    if n == 0:
        raise RequestError("the prompt has no tokens; it needs at least one", param="input_ids", code="empty_prompt")
    if n >= config.context_length:
        raise RequestError(
            f"the prompt has {n} tokens, and at most {config.context_length - 1} leave room for a new one "
            f"(context_length={config.context_length}); shorten it or raise --context-length",
            param="input_ids",
            code="context_length_exceeded",
        )
    if n > pool_tokens:
        raise RequestError(
            f"the prompt has {n} tokens, and the KV pool holds {pool_tokens}; shorten it or raise --max-total-tokens",
            param="input_ids",
            code="context_length_exceeded",
        )
    if config.recurrent and n > largest_chunk and logprob_start(req) >= 0:
        raise RequestError(
            f"logprobs of a prompt of {n} tokens: a model with recurrent states computes it whole for them, and a step takes "
            f"{largest_chunk}; shorten it, ask for output logprobs only, or raise --chunked-prefill-size",
            param="logprob_start_len",
        )
    if req.encoder_len > encoder_tokens:
        raise RequestError(
            f"an encoder's output of {req.encoder_len} tokens, and the pool for it holds {encoder_tokens}; send a smaller one",
            param="encoder_len",
            code="context_length_exceeded",
        )
    if req.cache_ids is not None and len(req.cache_ids) != n:
        raise RequestError(f"cache_ids has {len(req.cache_ids)} ids for a prompt of {n}", param="cache_ids")
    if config.max_queued is not None and num_waiting >= config.max_queued + num_free_slots:
        raise QueueFullError(
            f"{num_waiting} requests wait already (--max-queued-requests {config.max_queued}); retry later"
        )


def settle(req: Req, config: SchedulerConfig, pool_tokens: int, arrival: float, num_added: int) -> None:
    """Fill in what arrival decides. The KV of the last token is never written, so the pool may be one token short of it."""
    params = req.sampling
    req.arrival = arrival
    if req.encoder_len:  # what the decoder computes depends on it: a prefix is shared under the same output only
        req.namespace = (*req.namespace, req.encoder_key)
    req.max_len = min(len(req.input_ids) + params.max_new_tokens, config.context_length, pool_tokens + 1)
    req.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else req.eos_ids)
    drawn = (config.random_seed * SEED_STRIDE + num_added) & SEED_MASK
    req.seed = drawn if params.seed is None else params.seed
