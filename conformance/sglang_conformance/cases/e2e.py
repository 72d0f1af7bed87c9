"""The engine with each model: what a req is answered depends on nothing but its prompt, and leaves nothing behind."""

from __future__ import annotations

import torch

from sglang_conformance.case import Outputs
from sglang_conformance.e2e.case import add_engine_case
from sglang_conformance.e2e.env import NUM_NEW, EngineEnv
from sglang_conformance.e2e.models import MODELS
from sglang_conformance.e2e.relations import same_answers, same_rows
from sglang_conformance.e2e.soak import soak

LONG = 4  # units of an answer that outgrows the pool


def logits(env: EngineEnv) -> Outputs:
    """Log-probabilities of every token of the prompts, for the oracle to judge."""
    answers = env.engine().answers(env.prompts(), 1, every=0, scored=True)
    return {"logprobs": torch.stack([row for answer in answers for row in (*answer.prompt_rows, *answer.rows)])}


def decoded(env: EngineEnv) -> Outputs:
    """What is decoded token by token is what a prefill of the whole text says."""
    cold = env.cold()
    whole = env.engine().answers([answer.prompt + answer.tokens for answer in cold], 1, every=0, scored=True)
    rows = [row for answer in whole for row in answer.prompt_rows[-NUM_NEW:]]
    same_rows("decoding", env, [row for answer in cold for row in answer.rows], rows)
    return {}


def on_a_prefix(env: EngineEnv) -> Outputs:
    """On pages of the same prompt, and on those of a prompt and its answer, as when a talk goes on."""
    cold, engine = env.cold(), env.engine()
    prompts = [answer.prompt for answer in cold]
    engine.answers(prompts, NUM_NEW, every=0)
    again = engine.answers(prompts, NUM_NEW, every=0)
    assert all(a.num_cached > 0 for a in again if len(a.prompt) > engine.unit), (
        "a prompt came before, and is not cached"
    )
    same_answers("on a cached prefix", env, again, cold)
    further = [a.prompt + a.tokens + more[:4] for a, more in zip(again, reversed(prompts), strict=True)]
    hits = engine.answers(further, NUM_NEW, every=0)
    assert all(hit.num_cached >= a.num_cached for hit, a in zip(hits, again, strict=True)), "a talk loses its prefix"
    assert any(hit.num_cached > len(a.prompt) for hit, a in zip(hits, again, strict=True)), "an answer is not cached"
    engine.flush()
    same_answers("on a cached talk", env, hits, engine.answers(further, NUM_NEW, every=0))
    return {}


def in_chunks(env: EngineEnv) -> Outputs:
    """Prompts of several chunks, whose ends are within pages; first alone, then one beside the decoding of others."""
    cold, small = env.cold(), env.engine("small")
    for every in (None, 3):
        small.flush()
        chunked = small.answers([answer.prompt for answer in cold], NUM_NEW, every=every)
        same_answers("in chunks", env, chunked, cold)
    return {}


def batched(env: EngineEnv) -> Outputs:
    """All at once, and one every second step, so that some are computed beside the prompts of others. Twice gives the same."""
    cold, engine = env.cold(), env.engine()
    for every in (0, 2, 2):
        engine.flush()
        together = engine.answers([answer.prompt for answer in cold], NUM_NEW, every=every)
        same_answers("one every second step" if every else "in a batch", env, together, cold)
    return {}


def retracted(env: EngineEnv) -> Outputs:
    """Short prompts with long answers, which outgrow the pool: some start over."""
    small = env.engine("small")
    prompts, before = env.prompts([3, 6, 9]), small.stats()["retractions"]
    crowd = small.answers(prompts, LONG * small.unit, every=0)
    assert not small.retracts or small.stats()["retractions"] > before, "nothing was retracted: the pool is too large"
    same_answers("after a retraction", env, crowd, env.engine().answers(prompts, LONG * small.unit, every=0))
    return {}


def without_overlap(env: EngineEnv) -> Outputs:
    cold = env.cold()
    answers = env.engine("no overlap").answers([answer.prompt for answer in cold], NUM_NEW, every=2)
    same_answers("without overlap", env, answers, cold)
    return {}


def nothing_is_left(env: EngineEnv) -> Outputs:
    """200 reqs, some of them aborted."""
    soak(env.engine("small"), env.model)
    return {}


for model in MODELS:
    add_engine_case(model, "logits", logits)
    add_engine_case(model, "decode as prefill", decoded)
    add_engine_case(model, "prefix hit", on_a_prefix)
    add_engine_case(model, "chunked prefill", in_chunks)
    add_engine_case(model, "batched", batched)
    add_engine_case(model, "retracted", retracted)
    add_engine_case(model, "overlap off", without_overlap)
    add_engine_case(model, "200 requests", nothing_is_left, (torch.bfloat16,))
