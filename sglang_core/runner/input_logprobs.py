"""Log-probabilities of prompt tokens: hidden states of an extend mapped by the head, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglang_core.ops.sampling import token_logprobs, top_logprobs
from sglang_core.runner.slot_table import Int32
from sglang_core.types import StepPlan, TokenLogprobs

ROWS_AT_ONCE = 128  # bounds the logits held at once: 128 x 152k x 4 bytes is 78 MB


@dataclass(kw_only=True, slots=True)
class PromptRows:
    """What a step that maps rows of an extend is given. S rows, of which each predicts a token of the prompt."""

    hidden: Tensor  # [T, M], of the forward step
    rows: Tensor  # int32[S]
    ids: Tensor  # int32[S], the tokens that they predict
    token_adapter: Tensor | None  # int32[T], as `ForwardBatch.token_adapter`
    num_top: int


@dataclass(kw_only=True, slots=True)
class PromptLogprobs:
    own: Tensor  # float32[S], of ids
    top: Tensor  # float32[S, k], best first
    top_ids: Tensor  # int32[S, k]


def prompt_logprobs(head: Callable[[Tensor, Tensor | None], Tensor], given: PromptRows) -> PromptLogprobs:
    """The step, on the device."""
    adapters = None if given.token_adapter is None else given.token_adapter[given.rows]
    logprobs = torch.log_softmax(head(given.hidden[given.rows], adapters).float(), dim=-1)
    top_ids, top = top_logprobs(logprobs, given.num_top)
    return PromptLogprobs(own=token_logprobs(logprobs, given.ids), top=top, top_ids=top_ids)


class InputLogprobs:
    """Which rows a step owes, then their values. `run` is called on the stream, `result` after it."""

    def __init__(self, num_reqs: int) -> None:
        self._rows: list[int] = []  # row of the hidden states that predicts the token
        self._ids: list[int] = []
        self._req: list[int] = []
        self._num_top: list[int] = []
        self._out: list[list[TokenLogprobs]] = [[] for _ in range(num_reqs)]

    @classmethod
    def of(cls, plan: StepPlan, num_top: Int32) -> InputLogprobs | None:
        """None where no req of the plan wants any."""
        if not any(start >= 0 for start in plan.logprob_starts):
            return None
        wanted = cls(len(plan.slots))
        first_row = 0
        for req, start in enumerate(plan.logprob_starts):
            prefix, extend = plan.prefix_lens[req], plan.extend_lens[req]
            ids = plan.token_ids[first_row : first_row + extend]
            if start >= 0:
                if start == 0 and prefix == 0:
                    wanted._out[req].append(TokenLogprobs(ids[0], None))
                for position in range(max(start, prefix + 1), prefix + extend):
                    wanted._rows.append(first_row + position - 1 - prefix)
                    wanted._ids.append(ids[position - prefix])
                    wanted._req.append(req)
                    wanted._num_top.append(int(num_top[req]))
            first_row += extend
        return wanted

    def run(
        self,
        step: Callable[[PromptRows], PromptLogprobs],
        hidden: Tensor,
        token_adapter: Tensor | None,
        device: torch.device,
        bound: Callable[[int], int] | None,
    ) -> None:
        """hidden: [T, M], token_adapter: int32[T]. Fills the results, in position order within each req.

        `step` is `prompt_logprobs` as the device runs steps. `bound`: rows are filled up to one number, and the most top log-probabilities
        wanted to what it makes of them, so that few programs are compiled; None: as they are.
        """
        for start in range(0, len(self._rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            rows, num_top = self._rows[part], max(self._num_top[part])
            fill = [0] * (ROWS_AT_ONCE - len(rows) if bound is not None else 0)
            made = step(
                PromptRows(
                    hidden=hidden,
                    rows=torch.tensor(rows + fill, dtype=torch.int32, device=device),
                    ids=torch.tensor(self._ids[part] + fill, dtype=torch.int32, device=device),
                    token_adapter=token_adapter,
                    num_top=num_top if bound is None else bound(num_top),
                )
            )
            self._store(part, made.own.tolist(), made.top.tolist(), made.top_ids.tolist())

    def result(self) -> list[list[TokenLogprobs]]:
        return self._out

    def _store(self, part: slice, own: list[float], top: list[list[float]], top_ids: list[list[int]]) -> None:
        columns = zip(self._req[part], self._ids[part], self._num_top[part], own, top, top_ids)
        for req, token_id, num_top, logprob, row_top, row_top_ids in columns:
            self._out[req].append(TokenLogprobs(token_id, logprob, row_top_ids[:num_top], row_top[:num_top]))
