"""A step over a mesh gives the logits of one device: models, their layers and their sharding are as on any backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("jax")

import jax
import numpy as np
from jax.sharding import Mesh
from sglang_tpu.backend import HOST, TpuBackend
from sglang_tpu.environment import array, environment, lift, to_host, wrap
from sglang_tpu.mesh import AXIS, OF_A_RANK, MeshCommunicator
from sglang_tpu.opened import open_devices
from sglang_tpu.runtime import TpuRuntime

from sglang_core.api import DeviceInfo, MeshContext, RuntimeContext
from sglang_core.backend.selection import OpTable
from sglang_core.layers.build import BuildContext, packings
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.forward_batch import ForwardBatch, StepState
from sglang_core.models.registry import create_model
from sglang_core.ops import OPS
from sglang_core.weights.loader import load_model
from tests.models.harness import PAGE_SIZE, Row, Stepper, build_context
from tests.weights import test_quantised as quantised

RANKS, NUM_PAGES = 4, 16
CONFIGS = Path(__file__).parents[3] / "benchmarks" / "configs"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 131,
}  # the last rank has 32 rows of 33
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
PROMPTS = [[5, 9, 130, 2, 7], [3, 1, 4, 1, 5, 9, 2, 6, 77]]
NEXT = [[8], [100]]


def host(num_ranks: int) -> tuple[DeviceInfo, ...]:
    info = next(info for info in TpuBackend().probe() if info.path == HOST)
    return TpuBackend().mesh(MeshContext(device=info, num_ranks=num_ranks))


def forward(model: CausalLM) -> Callable[[StepState, ForwardBatch], Tensor]:
    def step(state: StepState, fb: ForwardBatch) -> Tensor:
        fb.pools = state.pools
        return model.head(model(fb))

    return step


def assert_logits_are_alike(
    load: Callable[[BuildContext], CausalLM],
    num_ranks: int,
    bound: float,
    prompts: list[list[int]] = PROMPTS,
    then: list[list[int]] = NEXT,
) -> CausalLM:
    """Of a model over so many ranks, as the engine brings it to a device, and of the op bodies on the host. Gives the mesh's."""
    infos = host(num_ranks)
    runtime = TpuRuntime(RuntimeContext(devices=infos), open_devices(infos))
    table = OpTable(infos[0], TpuBackend(), ops=OPS, page_size=PAGE_SIZE)
    groups = [runtime.communicator(range(num_ranks), rank, None) for rank in range(num_ranks)]
    contexts = [replace(build_context(tp=tp), table=table) for tp in groups]
    first = load(contexts[0])
    layouts = Stepper(first, num_pages=NUM_PAGES)  # lays batches out, and computes nothing
    ((group, spec),) = first.pool_specs(PAGE_SIZE, torch.float32).items()
    model = runtime.join_ranks(first if ctx is contexts[0] else load(ctx) for ctx in contexts)
    pool = runtime.alloc_pool(replace(spec, layout=table.pool_layout(group)), NUM_PAGES)
    state = StepState(pools={group: pool}, next_token_ids=torch.zeros(3, dtype=torch.int32))
    step, reference = (
        runtime.compile_step(forward(model), state, ()),
        Stepper(load(build_context()), num_pages=NUM_PAGES),
    )
    rows, expected_rows = [[Row() for _ in prompts] for _ in range(2)]
    for tokens in (prompts, then):
        made = step(layouts.batch(list(zip(rows, tokens, strict=True))))
        expected = torch.cat(reference.step(list(zip(expected_rows, tokens, strict=True))))
        assert float(expected.std()) > 0.3
        torch.testing.assert_close(made, expected, rtol=0, atol=bound)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_one_device(case: str) -> None:
    """Random weights depend on their name only: all numbers of ranks give the same model."""
    config = json.loads((CONFIGS / f"{case}.json").read_text()) | SIZES | CASES[case]
    assert_logits_are_alike(
        lambda ctx: load_model(create_model(config), "", ctx, load_format="dummy", progress=False), RANKS, 1e-4
    )


# Blocks of fp8 are cut nowhere: codes are one device's. In int8 a rank has a scale of its own for its part of a token's activations, and
# logits are off by a twentieth of their deviation.
@pytest.mark.parametrize(("kind", "bound"), [("fp8 block", 1e-3), ("ct int8", 0.1)])
def test_quantised_products_are_those_of_one_device(kind: str, bound: float, tmp_path: Path) -> None:
    config = quantised.CONFIG | {
        "head_dim": 128,
        "rope_theta": 1e4,
    }  # a rank has two query heads and one KV head, in whole blocks
    quantised.write(tmp_path, kind, config=config)
    facts = json.loads((tmp_path / "config.json").read_text())
    model = assert_logits_are_alike(
        lambda ctx: load_model(create_model(facts), tmp_path, ctx, progress=False),
        2,
        bound,
        [[token % 37 for token in prompt] for prompt in PROMPTS],
        [[token % 37 for token in prompt] for prompt in NEXT],
    )
    assert {packing.plan for packing in packings(model)} == {"kernel"}


def test_collectives_are_those_of_ranks() -> None:
    over = Mesh(np.array(open_devices(host(RANKS))), (AXIS,))
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
