"""Writes down one step: from the reqs chosen to the lists of integers that every rank's runner executes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sglang_core.scheduler.chunked_prefill import Chunk, logprob_start_in
from sglang_core.types import AdapterWrite, Batch, ForwardMode, Req, SlotInit, StepPlan


def build_batch(
    step: int, decodes: list[Req], chunks: list[Chunk], entered: Iterable[Req], adapter_writes: list[AdapterWrite]
) -> Batch:
    """The batch of one step, decodes first, and the marks on its reqs that the step is in flight.

    The KV of a decode's new token, at `reserved_len`, is written by this step; its id is -1 while the step that samples it is
    in flight itself.
    """
    reqs = decodes + [chunk.req for chunk in chunks]
    token_ids = [-1 if req.num_in_flight else req.output_ids[-1] for req in decodes]
    for req, start, stop in chunks:
        token_ids += req.token_ids(start, stop)
    sample = [True] * len(decodes) + [_samples(chunk) for chunk in chunks]
    plan = StepPlan(
        step=step,
        mode=_mode(decodes, chunks).value,
        slots=[req.slot for req in reqs],
        prefix_lens=[req.reserved_len for req in decodes] + [start for _, start, _ in chunks],
        extend_lens=[1] * len(decodes) + [stop - start for _, start, stop in chunks],
        token_ids=token_ids,
        sample=sample,
        page_starts={group: [req.sent_pages[group] for req in reqs] for group in reqs[0].pages},
        new_pages={group: [req.pages[group][req.sent_pages[group] :] for req in reqs] for group in reqs[0].pages},
        inits=[_slot_init(req) for req in entered],
        adapter_writes=adapter_writes,
        logprob_starts=_logprob_starts(len(decodes), chunks),
    )
    if reqs[0].states is not None:
        ends = [start + extend for start, extend in zip(plan.prefix_lens, plan.extend_lens, strict=True)]
        states = [req.states.step(end) for req, end in zip(reqs, ends, strict=True)]
        plan.state_reads.extend(read for read, _ in states)
        plan.state_writes.extend(write for _, write in states)
    _mark_in_flight(reqs, decodes, chunks, sample)
    return Batch(reqs=tuple(reqs), plan=plan)


def _mark_in_flight(reqs: list[Req], decodes: list[Req], chunks: list[Chunk], sample: Sequence[bool]) -> None:
    for group in reqs[0].pages:
        for req in reqs:
            req.sent_pages[group] = len(req.pages[group])
    for req in decodes:
        req.reserved_len += 1
        req.num_in_flight += 1
    for (req, _, stop), samples in zip(chunks, sample[len(decodes) :], strict=True):
        req.reserved_len = stop
        req.num_in_flight += samples


def _samples(chunk: Chunk) -> bool:
    """Only a prompt's last chunk gives a token, and none does where no token was asked for (max_new_tokens 0)."""
    return chunk.stop == chunk.req.num_tokens < chunk.req.max_len


def _mode(decodes: list[Req], chunks: list[Chunk]) -> ForwardMode:
    if not chunks:
        return ForwardMode.DECODE
    return ForwardMode.MIXED if decodes else ForwardMode.PREFILL


def _logprob_starts(num_decodes: int, chunks: list[Chunk]) -> list[int]:
    starts = [logprob_start_in(chunk) for chunk in chunks]
    return [-1] * num_decodes + starts if any(start >= 0 for start in starts) else []


def _slot_init(req: Req) -> SlotInit:
    params = req.sampling
    penalised = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
    return SlotInit(
        slot=req.slot,
        sampling=params,
        seed=req.seed,
        num_prompt_tokens=len(req.input_ids),
        history=req.input_ids + req.output_ids if penalised else [],
        stop_ids=sorted(req.stop_ids) if params.min_new_tokens else [],
        logprob=req.logprob,
        adapter=req.adapter_slot,
        encoder_len=req.encoder_len,
        encoder_pages=req.encoder_pages,
        encoder_is_new=req.encoder_is_new,
    )
