"""Log-probabilities of prompt tokens: hidden states of an extend mapped by the head, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sglang_core.runner.slot_table import Int32
from sglang_core.types import StepPlan, TokenLogprobs

ROWS_AT_ONCE = 128  # bounds the logits held at once: 128 x 152k x 4 bytes is 78 MB


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
        self, hidden: Tensor, head: Callable[[Tensor, Tensor | None], Tensor], token_adapter: Tensor | None
    ) -> None:
        """hidden: [T, M], token_adapter: int32[T]. Fills the results, in position order within each req."""
        with torch.inference_mode():
            for start in range(0, len(self._rows), ROWS_AT_ONCE):
                part = slice(start, start + ROWS_AT_ONCE)
                rows = torch.tensor(self._rows[part], dtype=torch.int32, device=hidden.device)
                ids = torch.tensor(self._ids[part], dtype=torch.int64, device=hidden.device)
                adapters = None if token_adapter is None else token_adapter[rows]
                logprobs = torch.log_softmax(head(hidden[rows], adapters).float(), dim=-1)
                own = logprobs.gather(1, ids[:, None])[:, 0].tolist()
                top, top_ids = torch.topk(logprobs, max(self._num_top[part]), dim=-1)
                self._store(part, own, top.tolist(), top_ids.tolist())

    def result(self) -> list[list[TokenLogprobs]]:
        return self._out

    def _store(self, part: slice, own: list[float], top: list[list[float]], top_ids: list[list[int]]) -> None:
        columns = zip(self._req[part], self._ids[part], self._num_top[part], own, top, top_ids)
        for req, token_id, num_top, logprob, row_top, row_top_ids in columns:
            self._out[req].append(TokenLogprobs(token_id, logprob, row_top_ids[:num_top], row_top[:num_top]))
