"""A step over a mesh of four devices gives the logits of one: models, their layers and their sharding are as on any backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("jax")

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from sglang_tpu.backend import TpuBackend
from sglang_tpu.environment import array, environment, lift, shape_of, to_host, to_jax, wrap
from sglang_tpu.mesh import AXIS, OF_A_RANK, MeshCommunicator
from sglang_tpu.pools import pool_of
from sglang_tpu.step import JittedStep

from sglang_core.backend.selection import OpTable
from sglang_core.layers.build import BuildContext
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.forward_batch import ForwardBatch, StepState
from sglang_core.models.registry import create_model
from sglang_core.ops import OPS
from sglang_core.weights.loader import load_model
from tests.models.harness import PAGE_SIZE, Row, Stepper, build_context

RANKS, NUM_PAGES = 4, 16
CONFIGS = Path(__file__).parents[3] / "benchmarks" / "configs"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 132}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # two ranks share each KV head
EXPERTS = {"num_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENTS = {
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
CASES = {
    "llama-3.1-8b": HEADS | {"attention_bias": True, "mlp_bias": True},
    "qwen3-30b-a3b": HEADS | EXPERTS,
    "deepseek-v2-lite": HEADS | EXPERTS | LATENTS,
}
PROMPTS = [[5, 9, 131, 2, 7], [3, 1, 4, 1, 5, 9, 2, 6, 77]]
NEXT = [[8], [100]]


def mesh() -> Mesh:
    devices = jax.devices("cpu")
    if len(devices) < RANKS:
        pytest.skip(f"{len(devices)} devices: JAX was up before XLA_FLAGS was set")
    return Mesh(np.array(devices[:RANKS]), (AXIS,))


def model_of(config: dict[str, Any], ctx: BuildContext) -> CausalLM:
    """Random weights depend on their name only: all sizes give the same model."""
    return load_model(create_model(config), "", ctx, load_format="dummy", progress=False)


def table_of(backend: TpuBackend) -> OpTable:
    info = next(info for info in backend.probe() if info.path == "tpu/cpu")
    return OpTable(info, backend, ops=OPS, page_size=PAGE_SIZE)


def join(ranks: Sequence[nn.Module], over: Mesh) -> None:
    """Rank 0's modules hold all ranks' tensors, a part on each device. Where another holds none (a bias of a sum) it is zeros."""
    joined: dict[int, Any] = {}
    for modules in zip(*(model.modules() for model in ranks), strict=True):
        for held in ("_parameters", "_buffers"):
            for name, first in getattr(modules[0], held).items():
                if first is None:
                    continue
                others = (getattr(module, held)[name] for module in modules[1:])
                parts = [first, *(torch.zeros_like(first) if other is None else other for other in others)]
                if id(first) not in joined:
                    joined[id(first)] = spread(parts, over)
                getattr(modules[0], held)[name] = joined[id(first)]


def spread(parts: Sequence[Tensor], over: Mesh) -> Any:
    x = wrap(shape_of(parts[0]))
    x._elem = jax.device_put(to_jax(torch.cat(list(parts))), NamedSharding(over, OF_A_RANK))
    return x


def forward(model: CausalLM) -> Callable[[StepState, ForwardBatch], Tensor]:
    def step(state: StepState, fb: ForwardBatch) -> Tensor:
        fb.pools = state.pools
        return model.head(model(fb))

    return step


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_one_device(case: str) -> None:
    over = mesh()
    config = json.loads((CONFIGS / f"{case}.json").read_text()) | SIZES | CASES[case]
    tables = [table_of(TpuBackend()) for _ in range(RANKS)]
    contexts = [
        replace(build_context(tp=MeshCommunicator(rank, RANKS)), table=table) for rank, table in enumerate(tables)
    ]
    whole, ranks = model_of(config, build_context()), [model_of(config, ctx) for ctx in contexts]
    ((group, spec),) = ranks[0].pool_specs(PAGE_SIZE, torch.float32).items()
    spec = replace(spec, layout=tables[0].pool_layout(group))
    zeros = torch.zeros(NUM_PAGES, PAGE_SIZE)

    def leaf(shape: Sequence[int], dtype: torch.dtype) -> Any:
        return spread([zeros.new_zeros(shape, dtype=dtype)] * RANKS, over)

    state = StepState(pools={group: pool_of(spec, NUM_PAGES, leaf)}, next_token_ids=torch.zeros(3, dtype=torch.int32))
    layouts = Stepper(ranks[0], num_pages=NUM_PAGES)  # lays batches out, and computes nothing
    join(ranks, over)
    step, reference = JittedStep(forward(ranks[0]), state, 0, mesh=over), Stepper(whole, num_pages=NUM_PAGES)
    rows, expected_rows = [[Row() for _ in PROMPTS] for _ in range(2)]
    for tokens in (PROMPTS, NEXT):
        made = step(layouts.batch(list(zip(rows, tokens, strict=True))))
        expected = torch.cat(reference.step(list(zip(expected_rows, tokens, strict=True))))
        assert float(expected.std()) > 0.3
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)


def test_collectives_are_those_of_ranks() -> None:
    over = mesh()
    x = torch.arange(RANKS * RANKS * 2, dtype=torch.float32).view(RANKS * RANKS, 2)
    parts = x.view(RANKS, RANKS, 2)
    total = parts.sum(0)
    comm = MeshCommunicator(0, RANKS)
    expected = {
        comm.all_reduce: torch.cat([total] * RANKS),
        comm.all_gather: torch.cat([parts.transpose(0, 1).flatten(1)] * RANKS),
        comm.reduce_scatter: total,
        comm.all_to_all: parts.transpose(0, 1).reshape(-1, 2),
        comm.broadcast: torch.cat([parts[0]] * RANKS),
    }

    def program(y: Any, collective: Callable[[Tensor], Any]) -> Any:
        with environment():
            return array(collective(wrap(y)))

    for collective, wanted in expected.items():
        made = jax.shard_map(
            lambda y, fn=collective: program(y, fn), mesh=over, in_specs=OF_A_RANK, out_specs=OF_A_RANK, check_vma=False
        )(array(lift(x)))
        assert to_host(wrap(made)).equal(wanted), collective.__name__


def test_no_rank_of_a_mesh_sends_alone() -> None:
    with pytest.raises(ValueError, match="one program"):
        MeshCommunicator(0, RANKS).send(torch.zeros(1), 1)
