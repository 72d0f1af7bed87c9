"""`ModelRunner`: executes step plans on one rank. The engine calls `launch`; everything behind it runs on the stream, in order."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from rich.progress import track
from torch import Tensor

from sglang_core.backend.interface import Bucket, DeviceRuntime, Work
from sglang_core.backend.selection import OpTable
from sglang_core.layers.forward_batch import AnyPlan, AnySpec, ForwardBatch, StepState
from sglang_core.runner.adapters import AdapterHost, Written
from sglang_core.runner.adjustments import Adjustments
from sglang_core.runner.input_logprobs import InputLogprobs, PromptLogprobs, PromptRows, prompt_logprobs
from sglang_core.runner.sampler import AdjustmentTensors, SampleInput, SampleOutput, Sampler
from sglang_core.runner.slot_table import Int32, SlotTable
from sglang_core.runner.step_input import build_step_input, padding_input
from sglang_core.runner.step_tensors import MANY_LOGPROBS, StepTensors, in_few
from sglang_core.runner.verify import KernelVerifier
from sglang_core.types import DropAdapter, LoadAdapter, PoolGroup, StepPlan, StepResult, TokenLogprobs

log = logging.getLogger(__name__)


class Model(Protocol):
    """What the runner asks of a model: hidden states, a head, and the attention specs to plan for."""

    @property
    def attn_plans(self) -> Mapping[AnySpec, Callable[..., AnyPlan]]: ...
    @property
    def pool_groups(self) -> Mapping[AnySpec, PoolGroup]: ...
    @property
    def logits_dtype(self) -> torch.dtype: ...

    def __call__(self, fb: ForwardBatch) -> Tensor: ...
    def head(self, rows: Tensor, row_adapter: Tensor | None = None) -> Tensor: ...


class PendingStep:
    """A launched step. `result` waits for it and lays its tokens out for the scheduler."""

    def __init__(self, plan: StepPlan, work: Work, input_logprobs: InputLogprobs | None, num_top: Int32) -> None:
        self._plan, self._work, self._input_logprobs, self._num_top = plan, work, input_logprobs, num_top

    def sampled(self) -> list[tuple[int, int]]:
        """(slot, token id) of every row that samples. Waits for the step."""
        output: SampleOutput = self._work.result()
        rows = zip(self._plan.slots, output.ids.tolist(), self._plan.sample)
        return [(slot, token_id) for slot, token_id, wanted in rows if wanted]

    def result(self) -> StepResult:
        """Raises whatever the step raised on the device."""
        output: SampleOutput = self._work.result()
        ids, sampled = output.ids.tolist(), self._plan.sample
        return StepResult(
            step=self._plan.step,
            token_ids=[[token] if wanted else [] for token, wanted in zip(ids, sampled)],
            num_accepted=[int(wanted) for wanted in sampled],
            logprobs=self._output_logprobs(output, ids),
            input_logprobs=self._input_logprobs.result() if self._input_logprobs else None,
        )

    def _output_logprobs(self, output: SampleOutput, ids: list[int]) -> list[list[TokenLogprobs]] | None:
        if output.logprobs is None or output.top_ids is None or output.top_logprobs is None:
            return None
        own, top_ids, top = output.logprobs.tolist(), output.top_ids.tolist(), output.top_logprobs.tolist()
        rows: list[list[TokenLogprobs]] = []
        for row, num_top in enumerate(self._num_top.tolist()):
            if num_top < 0 or not self._plan.sample[row]:
                rows.append([])
            else:
                rows.append([TokenLogprobs(ids[row], own[row], top_ids[row][:num_top], top[row][:num_top])])
        return rows


class _Compiled:
    """A step function for padded batches, and for exact ones where the runtime takes both."""

    def __init__(
        self, runtime: DeviceRuntime, fn: Callable[..., Any], state: StepState, buckets: Sequence[Bucket]
    ) -> None:
        self._padded = runtime.compile_step(fn, state, buckets)
        self._exact = runtime.compile_step(fn, state, ()) if buckets and runtime.takes_exact_shapes else self._padded

    def __call__(self, batch: Any, padded: bool) -> Any:
        return self._padded(batch) if padded else self._exact(batch)


class ModelRunner:
    """One rank's model, pools and slots. `launch` may be called again before the step before has finished."""

    def __init__(
        self,
        model: Model,
        table: OpTable,
        runtime: DeviceRuntime,
        state: StepState,
        slots: SlotTable,
        *,
        vocab_size: int,
        page_size: int,
        buckets: Sequence[Bucket] = (),
        verifier: KernelVerifier | None = None,
        adapters: AdapterHost | None = None,
    ) -> None:
        self._model, self._runtime, self._state, self._slots = model, runtime, state, slots
        self._page_size, self._buckets, self._verifier = page_size, buckets, verifier
        self._adapters = adapters
        self._tensors = StepTensors(
            runtime,
            state,
            slots,
            attn_plans=model.attn_plans,
            pool_groups=model.pool_groups,
            page_size=page_size,
            has_adapters=adapters is not None,
        )
        self._sampler = Sampler(table, vocab_size, model.logits_dtype)
        self._adjustments = Adjustments(vocab_size)
        self._stream = runtime.stream()
        self._forward = _Compiled(runtime, self._forward_step, state, buckets)
        self._sample = _Compiled(runtime, self._sampler.step, state, buckets)
        self._prompt = runtime.compile_step(self._prompt_step, state, ())
        self._num_eager_steps = 0
        self._adjusted_before: PendingStep | None = None  # the step before, where its tokens change later logits

    def launch(self, plan: StepPlan) -> PendingStep:
        """Start a step; the caller's thread only lays out its input. Plans are launched in the order of `plan.step`."""
        self._slots.apply(plan)
        step = build_step_input(
            plan, self._slots, self._page_size, self._buckets, exact_too=self._runtime.takes_exact_shapes
        )
        self._num_eager_steps += not step.padded
        forward_batch, sample = self._tensors.place(step)
        num_top = self._slots.num_top_logprobs[step.slots[: step.num_real_reqs]]
        wanted = InputLogprobs.of(plan, num_top)
        # A bucket has one form, and adapters are laid out by token.
        forward_batch.only_sampled = wanted is None and not step.padded and forward_batch.token_adapter is None
        sample.num_top = in_few(int(num_top.max()), MANY_LOGPROBS, step.padded)
        adjusted = bool(self._slots.adjusted[step.slots].any())
        run = self._run if self._verifier is None or not self._verifier.choose(plan.step) else self._run_verified
        writes = self._adapters.taken(plan.adapter_writes) if self._adapters is not None else []
        work = self._stream.submit(
            run, plan, step.padded, forward_batch, sample, wanted, adjusted, self._adjusted_before, writes
        )
        pending = PendingStep(plan, work, wanted, num_top)
        self._adjusted_before = pending if adjusted else None
        return pending

    def take(self, message: LoadAdapter | DropAdapter) -> None:
        """What rank 0 says between plans."""
        assert self._adapters is not None, "adapters are loaded where there is room for them"
        match message:
            case LoadAdapter(key=key, path=path):
                self._adapters.follow(key, path)
            case DropAdapter(key=key):
                self._adapters.drop(key)

    def stats(self) -> dict[str, float]:
        """Steps of no bucket so far; nothing where there are no buckets, or every step must have one."""
        exact_too = self._buckets and self._runtime.takes_exact_shapes
        return {"eager_steps": float(self._num_eager_steps)} if exact_too else {}

    def warm_up(self, *, progress: bool) -> None:
        """Compile every bucket with a batch of padding, on the stream, before the first req comes. Exact shapes need none."""
        for bucket in track(self._buckets, "compiling steps", disable=not (progress and self._buckets)):
            given = self._tensors.place(padding_input(bucket, self._slots))
            self._stream.submit(self._forward_and_sample, *given).result()

    def poison(self, group: PoolGroup, pages: Sequence[int]) -> None:
        """Fill freed pages with NaN once the steps launched so far are done: a runtime that checks steps asks for it."""
        self._stream.submit(self._state.pools[group].poison, list(pages))

    def close(self) -> None:
        self._stream.close()
        if self._verifier is not None:
            log.info("%s", self._verifier.report())

    # On the stream from here on.

    def _run(
        self,
        plan: StepPlan,
        padded: bool,
        forward_batch: ForwardBatch,
        sample: SampleInput,
        input_logprobs: InputLogprobs | None,
        adjusted: bool,
        adjusted_before: PendingStep | None,
        adapter_writes: Written,
    ) -> SampleOutput:
        if adapter_writes:
            assert self._adapters is not None
            self._adapters.write(adapter_writes)
        hidden, sample.logits = self._forward(forward_batch, padded)
        if input_logprobs is not None:
            bound = functools.partial(in_few, many=MANY_LOGPROBS, padded=True) if padded else None
            input_logprobs.run(self._prompt, hidden, forward_batch.token_adapter, self._runtime.torch_device, bound)
        if adjusted_before is not None:  # on an asynchronous device this waits; on a host stream it has just finished
            for slot, token_id in adjusted_before.sampled():
                self._adjustments.record(slot, token_id)
        for init in plan.inits:
            self._adjustments.admit(init)
        if adjusted:
            sample.adjustment = self._adjustment(plan, padded)
        output: SampleOutput = self._runtime.to_host(self._sample(sample, padded))
        return output

    def _forward_and_sample(self, forward_batch: ForwardBatch, sample: SampleInput) -> None:
        _, sample.logits = self._forward(forward_batch, True)
        self._sample(sample, True)

    def _run_verified(self, *args: Any) -> SampleOutput:
        """`_run` with every kernel compared with its reference body."""
        assert self._verifier is not None
        self._verifier.active = True
        try:
            return self._run(*args)
        finally:
            self._verifier.active = False
            self._verifier.num_steps += 1

    def _forward_step(self, state: StepState, fb: ForwardBatch) -> tuple[Tensor, Tensor]:
        """-> hidden: [T, M], or [R, M] where only sampled rows are read, and logits: [R, V], of each req's last token."""
        fb.pools = state.pools
        if fb.token_slots is not None:
            on_device = state.next_token_ids[fb.token_slots.clamp(min=0)]
            fb.token_ids = torch.where(fb.token_slots >= 0, on_device, fb.token_ids)
        hidden = self._model(fb)
        rows, row_adapter = hidden, fb.token_adapter
        if fb.sample_rows is not None and not fb.narrowed:
            rows, row_adapter = rows[fb.sample_rows], None if row_adapter is None else row_adapter[fb.sample_rows]
        return hidden, self._model.head(rows, row_adapter)

    def _prompt_step(self, state: StepState, given: PromptRows) -> PromptLogprobs:
        return prompt_logprobs(self._model.head, given)

    def _adjustment(self, plan: StepPlan, padded: bool) -> AdjustmentTensors:
        sparse = self._adjustments.sparse(plan.slots)
        if padded:
            sparse = sparse.padded()
        given = {"rows": sparse.rows, "ids": sparse.ids, "repetition": sparse.repetition, "add": sparse.add}
        return AdjustmentTensors(**self._runtime.to_device(given))
