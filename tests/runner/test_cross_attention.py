"""A model that does nothing but attend to an encoder's output, run by the scheduler and the runner."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.interface import RuntimeContext
from sglang_core.backend.pool import PoolSpec
from sglang_core.backend.selection import OpTable
from sglang_core.cache.page_allocator import PageAllocator
from sglang_core.cache.radix import RadixCache
from sglang_core.layers.forward_batch import ForwardBatch, StepState
from sglang_core.ops import OPS
from sglang_core.ops.attention import AttnSpec, attn_paged, attn_plan, kv_write
from sglang_core.runner.model_runner import ModelRunner
from sglang_core.runner.slot_table import SlotTable
from sglang_core.scheduler import Scheduler, SchedulerConfig
from sglang_core.types import CROSS, FULL, Req, SamplingParams

PAGE_SIZE, HEADS, DIM, VOCAB = 4, 2, 8, 11
SPEC = AttnSpec(
    num_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM, v_head_dim=DIM, scale=DIM**-0.5, causal=False, cross=True
)
POOL = {"num_layers": 1, "page_size": PAGE_SIZE, "num_kv_heads": HEADS, "head_dim": DIM, "v_head_dim": DIM}


class Listener:
    """Queries are token embeddings; logits are the attended values' first numbers."""

    attn_plans = {SPEC: attn_plan}
    pool_groups = {SPEC: CROSS}

    def __init__(self) -> None:
        self.embedding = torch.randn(VOCAB, HEADS, DIM, generator=torch.Generator().manual_seed(0))
        self.outputs: list[Tensor] = []

    def __call__(self, fb: ForwardBatch) -> Tensor:
        q = self.embedding[fb.token_ids]
        o = attn_paged(q, None, None, fb.pools[CROSS], 0, SPEC, fb.plans[SPEC])
        assert isinstance(o, Tensor)
        self.outputs.append(o)
        return o.flatten(1)

    @property
    def logits_dtype(self) -> torch.dtype:
        return torch.float32

    def head(self, hidden: Tensor, row_adapter: Tensor | None = None) -> Tensor:
        return hidden[:, :VOCAB].float()


def encoded(key: str, length: int) -> tuple[Tensor, Tensor]:
    """What an encoder makes of this content. -> k, v: [length, HEADS, DIM]."""
    generator = torch.Generator().manual_seed(sum(key.encode()))
    k, v = torch.randn(2, length, HEADS, DIM, generator=generator)
    return k, v


def test_every_token_sees_all_of_its_own_encoder_output() -> None:
    backend = CpuBackend()
    runtime = backend.create_runtime(RuntimeContext(devices=tuple(backend.probe())))
    specs = [PoolSpec(dtype=torch.float32, **POOL), PoolSpec(group=CROSS, encoder_len=20, dtype=torch.float32, **POOL)]
    pools = {spec.group: runtime.alloc_pool(spec, 40) for spec in specs}
    for pool in pools.values():
        pool.poison(range(40))
    model, table = Listener(), OpTable(backend.probe()[0], backend, ops=OPS, page_size=PAGE_SIZE)
    state = StepState(pools=pools, next_token_ids=torch.zeros(5, dtype=torch.int32))
    slots = SlotTable(4, 16, VOCAB, (FULL,), encoder_columns=5)
    runner = ModelRunner(model, table, runtime, state, slots, vocab_size=VOCAB, page_size=PAGE_SIZE)
    config = SchedulerConfig(
        max_running=4,
        context_length=64,
        page_size=PAGE_SIZE,
        token_budget=8,
        groups=tuple(spec.group_spec for spec in specs),
    )
    cache = RadixCache(PAGE_SIZE, config.tree_groups)
    scheduler = Scheduler(config, cache, {g: PageAllocator(40) for g in pools}, iter(range(1000)).__next__)
    for rid, key, length in (("a", "cat", 13), ("b", "dog", 20), ("c", "cat", 13), ("d", "", 0)):
        sampling = SamplingParams(max_new_tokens=3, temperature=0.0)
        scheduler.add_req(
            Req(rid=rid, input_ids=[1, 2, 3, 4, 5], sampling=sampling, encoder_key=key, encoder_len=length)
        )
    num_written = 0
    while scheduler.has_work:
        batch = scheduler.schedule()
        assert batch is not None
        by_slot = {req.slot: req for req in batch.reqs}
        for init in batch.plan.inits:
            if init.encoder_is_new:  # a model's encoder would do this, in the same step and before
                num_written += 1
                at = torch.arange(init.encoder_len, dtype=torch.int32)
                where = (
                    torch.tensor(init.encoder_pages, dtype=torch.int32)[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE
                )
                kv_write(*encoded(by_slot[init.slot].encoder_key, init.encoder_len), pools[CROSS], 0, where)
        scheduler.process_results(batch, runner.launch(batch.plan).result())
        check(model.outputs.pop(), batch.reqs, batch.plan, model.embedding)
    assert num_written == 2, "a and c attend to the same pages"
    runner.close()


def check(outputs: Tensor, reqs: tuple[Req, ...], plan, embedding: Tensor) -> None:
    """Against attention over each req's output by itself, token by token."""
    row = 0
    for req, start, extend in zip(reqs, plan.prefix_lens, plan.extend_lens, strict=True):
        for token in (req.input_ids + req.output_ids)[start : start + extend]:
            expected = torch.zeros(HEADS, DIM)
            if req.encoder_len:
                k, v = encoded(req.encoder_key, req.encoder_len)
                weights = torch.einsum("hd,shd->hs", embedding[token], k).mul(SPEC.scale).softmax(-1)
                expected = torch.einsum("hs,shd->hd", weights, v)
            torch.testing.assert_close(outputs[row], expected, rtol=1e-5, atol=1e-5)
            row += 1
    assert row == len(outputs)
