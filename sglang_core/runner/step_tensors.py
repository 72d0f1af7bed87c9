"""A step's input on the device: the forward's, the sampling's, and the plans of attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sglang_core.backend.interface import DeviceRuntime
from sglang_core.layers.forward_batch import AnyPlan, AnySpec, ForwardBatch, StepState
from sglang_core.ops.attention import AttnBatch
from sglang_core.ops.sampling import SampleParams
from sglang_core.ops.ssm_plan import StateBatch
from sglang_core.runner.sampler import SampleInput
from sglang_core.runner.slot_table import SlotTable
from sglang_core.runner.step_input import StepInput
from sglang_core.types import PoolGroup

MANY_LOGPROBS, MANY_TOP_K = 32, 64  # what compiled steps make of fewer


def in_few(count: int, many: int, padded: bool) -> int:
    """A bound that joins the compile key, in few values where steps are compiled: `many` for all from 1 to it."""
    return many if padded and 0 < count <= many else count


class StepTensors:
    """Made once for a runner."""

    def __init__(
        self,
        runtime: DeviceRuntime,
        state: StepState,
        slots: SlotTable,
        *,
        attn_plans: Mapping[AnySpec, Callable[..., AnyPlan]],
        pool_groups: Mapping[AnySpec, PoolGroup],
        page_size: int,
        has_adapters: bool,
    ) -> None:
        self._runtime, self._state, self._slots = runtime, state, slots
        self._attn_plans, self._pool_groups, self._page_size = attn_plans, pool_groups, page_size
        self._has_adapters = has_adapters

    def place(self, step: StepInput) -> tuple[ForwardBatch, SampleInput]:
        """What the forward and the sampling read, on the device: without logits, and with no log-probabilities wanted."""
        arrays = self._arrays(step)
        placed, device = self._runtime.to_device(arrays), self._runtime.torch_device
        plans = {}
        for spec, plan in self._attn_plans.items():
            group = self._pool_groups[spec]
            plans[spec] = plan(spec, self._batch_for(step, group), device)
        forward_batch = ForwardBatch(
            token_ids=placed["token_ids"],
            token_slots=placed.get("token_slots"),
            positions=placed["positions"],
            sample_rows=placed.get("sample_rows"),
            plans=plans,
            token_adapter=placed.get("token_adapter"),
        )
        params = self._sample_params(arrays, placed, step.padded)
        return forward_batch, SampleInput(
            logits=None, params=params, slots=placed["slots"], adjustment=None, num_top=-1
        )

    def _arrays(self, step: StepInput) -> dict[str, NDArray[Any]]:
        table, slots = self._slots, step.slots
        arrays: dict[str, NDArray[Any]] = {
            "token_ids": step.token_ids,
            "positions": step.positions,
            "slots": slots,
            "seq_lens": step.seq_lens,
            "temperature": table.temperature[slots],
            "top_p": table.top_p[slots],
            "top_k": table.top_k[slots],
            "min_p": table.min_p[slots],
            "seeds": table.seed[slots],
        }
        if step.token_slots is not None:
            arrays["token_slots"] = step.token_slots
        if step.sample_rows is not None:
            arrays["sample_rows"] = step.sample_rows
        # None where no token has one, unless the step is padded: each bucket has one form.
        if self._has_adapters and (step.padded or (step.token_adapter >= 0).any()):
            arrays["token_adapter"] = step.token_adapter
        return arrays

    def _sample_params(
        self, arrays: Mapping[str, NDArray[Any]], placed: Mapping[str, Tensor], padded: bool
    ) -> SampleParams:
        vocab_size, top_k = self._slots.vocab_size, arrays["top_k"]
        greedy = bool((arrays["temperature"] == 0).all())
        bounded = not (greedy and padded) and bool((top_k < vocab_size).all())
        filters = bool((arrays["top_p"] < 1).any() or (top_k < vocab_size).any() or (arrays["min_p"] > 0).any())
        max_top_k = in_few(int(top_k.max()), MANY_TOP_K, padded) if bounded else 0
        return SampleParams(
            temperature=placed["temperature"],
            top_p=placed["top_p"],
            top_k=placed["top_k"],
            min_p=placed["min_p"],
            seeds=placed["seeds"],
            positions=placed["seq_lens"],
            all_greedy=greedy,
            max_top_k=0 if padded and max_top_k > MANY_TOP_K else max_top_k,
            needs_filter=filters and not (greedy and padded),
        )

    def _batch_for(self, step: StepInput, group: PoolGroup) -> AttnBatch | StateBatch:
        kind = self._state.pools[group].spec.group_spec.kind
        if kind == "state":
            return self._state_batch(step)
        return self._cross_batch(step) if kind == "cross" else self._attn_batch(step, group)

    def _cross_batch(self, step: StepInput) -> AttnBatch:
        """New tokens over what an encoder wrote before."""
        return AttnBatch(
            cu_extend_cpu=torch.from_numpy(step.cu_extend),
            prefix_lens_cpu=torch.from_numpy(step.prefix_lens),
            seq_lens_cpu=torch.from_numpy(step.encoder_lens),
            page_table_cpu=torch.from_numpy(step.encoder_table),
            slot_mapping_cpu=torch.zeros(step.num_tokens, dtype=torch.int32),
            num_tokens=step.num_tokens,
            num_reqs=step.num_reqs,
            max_extend=step.max_extend,
            num_pages=step.encoder_table.shape[1],
            page_size=self._page_size,
            static=step.padded,
        )

    def _attn_batch(self, step: StepInput, group: PoolGroup) -> AttnBatch:
        return AttnBatch(
            cu_extend_cpu=torch.from_numpy(step.cu_extend),
            prefix_lens_cpu=torch.from_numpy(step.prefix_lens),
            seq_lens_cpu=torch.from_numpy(step.seq_lens),
            page_table_cpu=torch.from_numpy(step.page_table[group]),
            slot_mapping_cpu=torch.from_numpy(step.slot_mapping[group]),
            num_tokens=step.num_tokens,
            num_reqs=step.num_reqs,
            max_extend=step.max_extend,
            num_pages=step.num_pages,
            page_size=self._page_size,
            static=step.padded,
        )

    def _state_batch(self, step: StepInput) -> StateBatch:
        return StateBatch(
            cu_extend_cpu=torch.from_numpy(step.cu_extend),
            read_slots_cpu=torch.from_numpy(step.state_reads),
            write_slots_cpu=torch.from_numpy(step.state_writes),
            num_tokens=step.num_tokens,
            num_reqs=step.num_reqs,
            max_extend=step.max_extend,
            static=step.padded,
        )
