"""What the scheduler is told: resolved values only, no "auto" left."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_core.errors import ConfigError
from sglang_core.scheduler.policy import POLICIES
from sglang_core.types import FULL_GROUP, GroupSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Limits and policies of one scheduler. Raises ConfigError for values that could not work."""

    max_running: int  # reqs in a batch; slots are [0, max_running)
    context_length: int  # tokens a req may hold, prompt and output
    page_size: int = 1
    token_budget: int = 8192  # new tokens a step computes, its decodes included, so it bounds the batch as well
    chunked: bool = (
        True  # cut prompts to the budget; else each runs whole, and one above the budget without other prompts
    )
    max_queued: int | None = None
    policy: str = "lpm"
    max_in_flight: int = 1  # steps given to the device whose results are not processed: 2 with overlap, pp_size + 1
    random_seed: int = 0
    tokens_per_step: int = 1  # S: tokens that a decode step may accept
    fair_every: int = 16  # a policy may pass over the oldest waiting req so often, then it goes first
    output_reserve: float = 0.7  # share of a req's allowed output that pages are kept for at first; adapts
    num_adapter_slots: int = 0  # adapters that the reqs of a batch may have between them
    prefix_wait_tokens: int = 64  # tokens that another req must be computing for a req to wait for them
    groups: tuple[GroupSpec, ...] = (FULL_GROUP,)  # pools of the model

    @property
    def tree_groups(self) -> tuple[GroupSpec, ...]:
        """Groups whose pages the prefix tree holds: an encoder's output is no prefix."""
        return tuple(group for group in self.groups if group.kind != "cross")

    @property
    def recurrent(self) -> bool:
        """Whether the model has states: what comes before a token is then known only where one was kept."""
        return any(group.kind == "state" for group in self.groups)

    def __post_init__(self) -> None:
        for name in ("max_running", "page_size", "max_in_flight", "tokens_per_step", "fair_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0.0 <= self.output_reserve <= 1.0:
            raise ConfigError(f"output_reserve={self.output_reserve} must be between 0 and 1")
        if self.context_length < 2:
            raise ConfigError(f"context_length={self.context_length} must be at least 2: one prompt and one new token")
        if self.token_budget < 2:  # a chunk with input logprobs computes one token again
            raise ConfigError(f"token_budget={self.token_budget} must be at least 2; set --chunked-prefill-size")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy={self.policy!r} is not one of {', '.join(POLICIES)}; set --schedule-policy")
        if self.tokens_per_step > 1 and self.recurrent:
            raise ConfigError(
                f"tokens_per_step={self.tokens_per_step} is not supported for a model with recurrent states: "
                "the state after some of a step's tokens is not kept; set it to 1"
            )
        if self.tokens_per_step > 1 and self.max_in_flight > 1:
            raise ConfigError(
                f"tokens_per_step={self.tokens_per_step} needs max_in_flight=1, not {self.max_in_flight}: "
                "where the next step begins is known only when this one is processed"
            )
