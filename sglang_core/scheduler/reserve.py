"""How many pages to keep for what running reqs will still write."""

from __future__ import annotations

from collections.abc import Iterable

from sglang_core.types import Req

LOWEST, HIGHEST = 0.1, 1.0  # share of its remaining output that a req is expected to write
DECAY_STEPS = 600  # steps without retraction that bring the share from where it starts to LOWEST
RETRACTION_JUMP = 0.25
MOST_EXPECTED = 4096  # of a req whose max_new_tokens only means "until it ends"


class OutputReserve:
    """Guesses the output still to come as a share of what is allowed.

    Too low and reqs are retracted, too high and the batch is small: each step lowers the share a little, each retraction
    raises it by a jump.
    """

    def __init__(self, start: float) -> None:
        self.ratio = start
        self._lowest = min(start, LOWEST)
        self._decay = (start - self._lowest) / DECAY_STEPS

    def step(self) -> None:
        self.ratio = max(self._lowest, self.ratio - self._decay)

    def retracted(self) -> None:
        self.ratio = min(HIGHEST, self.ratio + RETRACTION_JUMP)

    def pages(self, reqs: Iterable[Req], page_size: int) -> int:
        """Pages that these reqs are expected to need beyond those for the tokens they have."""
        tokens = [min(req.max_len - req.num_tokens, MOST_EXPECTED) for req in reqs]
        return -(-int(self.ratio * sum(tokens)) // page_size)
