"""A runner small enough to trust: pages, plans and steps for a loaded model, no scheduler and no cache policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglang_core.backend.communicator import Communicator, LocalCommunicator
from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.backend.pool import Pool
from sglang_core.backend.selection import OpTable
from sglang_core.backend.state_pool import StatePool, StatePoolSpec
from sglang_core.layers.build import BuildContext
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.models.registry import model_class
from sglang_core.ops import OPS
from sglang_core.ops.attention import AttnBatch
from sglang_core.ops.ssm_plan import GatedDeltaSpec, StateBatch
from sglang_core.weights.checkpoint import read_config
from sglang_core.weights.loader import load_model

CPU = torch.device("cpu")
PAGE_SIZE = 4


def build_context(
    *,
    context_length: int = 256,
    dtype: torch.dtype = torch.float32,
    kv_dtype: str = "auto",
    tp: Communicator | None = None,
    ep_size: int = 1,
) -> BuildContext:
    backend = CpuBackend()
    return BuildContext(
        table=OpTable(backend.probe()[0], backend, ops=OPS, page_size=PAGE_SIZE),
        dtype=dtype,
        device=CPU,
        context_length=context_length,
        page_size=PAGE_SIZE,
        kv_dtype=kv_dtype,
        tp=tp or LocalCommunicator(),
        ep_size=ep_size,
    )


def load(folder: Path, *, changes: dict[str, Any] | None = None, **context: Any) -> CausalLM:
    """The checkpoint in `folder`, with some facts of its ModelConfig changed."""
    hf_config = read_config(folder)
    found = model_class(hf_config)
    model = found(found.read_config(hf_config).replace(**(changes or {})))
    return load_model(model, folder, build_context(**context), progress=False)


@dataclass
class Row:
    """A req: the tokens whose KV is in `pages`, in order, and where its state was kept after each step."""

    num_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    states: dict[int, int] = field(default_factory=lambda: {0: 0})  # number of tokens -> slot of the state after them


class Stepper:
    """Runs steps of a model over pools it owns. Every page but those handed out is poisoned with NaN."""

    def __init__(self, model: CausalLM, *, num_pages: int = 512) -> None:
        self.model = model
        specs = model.pool_specs(PAGE_SIZE, kv_dtype(model))
        self.pools = {
            group: (StatePool if isinstance(spec, StatePoolSpec) else Pool)(spec, num_pages, CPU)  # type: ignore[arg-type]
            for group, spec in specs.items()
        }
        for pool in self.pools.values():
            pool.poison(range(num_pages))
        model.prepare_pools(self.pools)
        self.free = list(range(num_pages - 1, 0, -1))  # page 0 is scratch
        self.free_states = list(self.free)

    def share_prefix(self, row: Row, num_tokens: int) -> Row:
        """A new req that starts on whole pages of another, as after a cache hit."""
        assert num_tokens % PAGE_SIZE == 0 and num_tokens <= row.num_tokens
        return Row(num_tokens, row.pages[: num_tokens // PAGE_SIZE], {num_tokens: row.states.get(num_tokens, 0)})

    def step(self, work: list[tuple[Row, list[int]]]) -> list[Tensor]:
        """Extend each req by its tokens -> logits of every new token: [extend, V] a req."""
        fb = self.batch(work)
        with torch.inference_mode():
            logits = self.model.head(self.model(fb))
        return list(logits.split([len(tokens) for _, tokens in work]))

    def batch(self, work: list[tuple[Row, list[int]]]) -> ForwardBatch:
        for row, tokens in work:
            while len(row.pages) * PAGE_SIZE < row.num_tokens + len(tokens):
                row.pages.append(self.free.pop())
        columns = max(len(row.pages) for row, _ in work)
        table = [row.pages + [0] * (columns - len(row.pages)) for row, _ in work]
        extends = [len(tokens) for _, tokens in work]
        prefixes = [row.num_tokens for row, _ in work]
        positions = [p for (row, tokens) in work for p in range(row.num_tokens, row.num_tokens + len(tokens))]
        owners = [row for row, tokens in work for _ in tokens]
        slots = [o.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for o, p in zip(owners, positions, strict=True)]
        batch = AttnBatch(
            cu_extend_cpu=_int([sum(extends[:i]) for i in range(len(extends) + 1)]),
            prefix_lens_cpu=_int(prefixes),
            seq_lens_cpu=_int([p + e for p, e in zip(prefixes, extends, strict=True)]),
            page_table_cpu=_int(table),
            slot_mapping_cpu=_int(slots),
            num_tokens=sum(extends),
            num_reqs=len(work),
            max_extend=max(extends),
            num_pages=columns,
            page_size=PAGE_SIZE,
        )
        reads, writes = [], []
        for row, tokens in work:
            reads.append(row.states[row.num_tokens])
            row.num_tokens += len(tokens)
            writes.append(self.free_states.pop())
            row.states[row.num_tokens] = writes[-1]
        states = StateBatch(
            cu_extend_cpu=batch.cu_extend_cpu,
            read_slots_cpu=_int(reads),
            write_slots_cpu=_int(writes),
            num_tokens=batch.num_tokens,
            num_reqs=batch.num_reqs,
            max_extend=batch.max_extend,
        )
        return ForwardBatch(
            token_ids=_int([t for _, tokens in work for t in tokens]),
            token_slots=None,
            positions=_int(positions),
            sample_rows=torch.arange(sum(extends), dtype=torch.int32),
            plans={
                spec: plan(spec, states if isinstance(spec, GatedDeltaSpec) else batch, CPU)
                for spec, plan in self.model.attn_plans.items()
            },
            pools=self.pools,
        )

    def logits(self, tokens: list[int]) -> Tensor:
        """One req in one chunk -> [len(tokens), V]."""
        return self.step([(Row(), tokens)])[0]


def model_dtype(model: CausalLM) -> torch.dtype:
    return next(b for b in model.buffers() if b.is_floating_point()).dtype


def kv_dtype(model: CausalLM) -> torch.dtype:
    named = {getattr(spec, "kv_dtype", "auto") for spec in model.attn_specs} - {"auto"}
    return KV_DTYPES[named.pop()] if named else model_dtype(model)


def _int(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
