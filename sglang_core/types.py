"""The words the engine speaks: sampling parameters, requests, batches, step plans and results. No torch here."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

PoolGroup = str  # pages, page tables and radix nodes are keyed by pool group
FULL: PoolGroup = "full"
STATE: PoolGroup = "state"
CROSS: PoolGroup = "cross"


def window_group(window: int) -> PoolGroup:
    """The group of all layers that see `window` tokens: layers with another window let go of other pages."""
    return f"window-{window}"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """What scheduler and prefix tree must know of a pool group: for how long its pages are of use.

    full: a page of tokens is read as long as the req runs. windowed: only while one of its tokens is among the last `window`.
    state: a page is one state, of all tokens up to one position. cross: pages of an encoder's output, written once.
    """

    name: PoolGroup
    kind: Literal["full", "windowed", "state", "cross"] = "full"
    window: int | None = None

    def __post_init__(self) -> None:
        assert (self.kind == "windowed") == (self.window is not None), f"{self.kind} with window={self.window}"


FULL_GROUP = GroupSpec(name=FULL)

GREEDY_TEMPERATURE = 1e-5  # below it a temperature means argmax


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one req picks its tokens. Field names are SGLang's; bounds are checked by `validate`."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1 means all
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()  # checked by the detokenizer, on text
    stop_token_ids: tuple[int, ...] = ()  # checked by the scheduler, on ids
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False  # keep the matched stop string or token in the text
    n: int = 1
    seed: int | None = None  # None: drawn by the engine when the req arrives

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    @property
    def has_adjustments(self) -> bool:
        """Whether logits depend on the tokens so far or on a bias, so that sampling needs host-known tokens."""
        return bool(
            self.frequency_penalty
            or self.presence_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.min_new_tokens
        )


class LogprobParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which log-probabilities a req asks for."""

    top_logprobs_num: int = 0
    logprob_start_len: int = -1  # first input position with logprobs; -1: output tokens only


class FinishReason(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a req ended. `matched` is the stop id or string; `message` and `status` belong to aborts."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    message: str | None = None
    status: int | None = None


class ReqStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, kw_only=True, slots=True)
class Req:
    """One generation request and its token state. Changed only by the scheduler.

    Token positions `[0, committed_len)` have their KV in pages of `pages`; `[committed_len, reserved_len)` are being
    computed by steps in flight. The radix tree owns the pages of `[0, cached_len)`, which `node` pins; the req owns the rest.
    """

    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    logprob: LogprobParams | None = None
    cache_ids: list[int] | None = None  # what the radix tree is keyed by where it differs from input_ids (images)
    namespace: tuple[str, ...] = ()  # (salt, adapter@version, weights version)
    priority: int = 0
    arrival: float = 0.0  # scheduler clock, seconds
    eos_ids: frozenset[int] = frozenset()
    holds: set[str] = field(default_factory=set)  # reasons it may not start yet: grammar, adapter, encoder, kv_transfer
    adapter: str = ""  # key (name@version) of its LoRA adapter; "" for none

    status: ReqStatus = ReqStatus.WAITING
    output_ids: list[int] = field(default_factory=list)
    num_in_flight: int = 0  # output tokens being computed whose ids the host does not know yet
    slot: int = -1  # row in the per-req device tables while running
    adapter_slot: int = -1  # where its adapter is on the device while it runs
    pages: dict[PoolGroup, list[int]] = field(default_factory=dict)  # in position order, 0 where it needs none any more
    committed_len: int = 0
    reserved_len: int = 0
    cached_len: int = 0  # tokens whose pages the radix tree owns and `node` pins
    node: Any = None  # the radix node it pins; only scheduler and cache look inside
    num_cached_tokens: int = 0  # prompt tokens served from the cache at first admission, for usage
    num_retractions: int = 0
    max_len: int = 0  # tokens it may hold in all: prompt and outputs, within context length and pool; set on arrival
    stop_ids: frozenset[int] = frozenset()  # eos_ids unless ignored, and sampling.stop_token_ids; set on arrival
    seed: int = 0  # of its sampling, resolved on arrival so that a retraction does not change it
    sent_pages: dict[PoolGroup, int] = field(default_factory=dict)  # page-table columns that the runner has right
    quota: dict[PoolGroup, int] = field(default_factory=dict)  # of bounded groups: pages that it may hold at once
    first_pages: dict[PoolGroup, int] = field(default_factory=dict)  # of windowed groups: columns before it are behind
    held_tail: dict[PoolGroup, list[int]] = field(default_factory=dict)  # loose pages that it pins at the end of `node`
    states: Any = None  # its recurrent states; only the scheduler looks inside
    encoder_len: int = 0  # tokens of an encoder's output that it attends to
    encoder_key: str = ""  # their content: equal keys have equal keys and values
    encoder_pages: list[int] = field(default_factory=list)  # where they are while it runs
    encoder_is_new: bool = False  # nobody wrote them before
    finish_reason: FinishReason | None = None
    abort_requested: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids the host knows."""
        return len(self.input_ids) + len(self.output_ids)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Known ids of positions `[start, stop)`, prompt then output."""
        n = len(self.input_ids)
        if stop <= n:
            return self.input_ids[start:stop]
        if start >= n:
            return self.output_ids[start - n : stop - n]
        return self.input_ids[start:] + self.output_ids[: stop - n]


class ForwardMode(enum.Enum):
    PREFILL = "prefill"  # every req extends by known prompt tokens
    DECODE = "decode"  # every req extends by one token
    MIXED = "mixed"


class SlotInit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A req that enters a slot with this step: what the runner keeps for it until the slot is reused."""

    slot: int
    sampling: SamplingParams
    seed: int
    num_prompt_tokens: int
    history: list[int] = []  # known tokens, sent only where penalties need them
    stop_ids: list[int] = []  # masked until min_new_tokens
    logprob: LogprobParams | None = None
    adapter: int = -1  # slot of its adapter, -1 for none
    encoder_len: int = 0  # tokens of an encoder's output that it attends to
    encoder_pages: list[int] = []  # where their keys and values are
    encoder_is_new: bool = False  # they are to be written before this step attends to them


class AdapterWrite(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter enters a slot on the device, in place of what was there, before the step that this comes with."""

    slot: int
    adapter: str  # key, name@version


class StepPlan(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """One step in host integers: what rank 0's scheduler decides and every rank's runner executes.

    Lists are per req in batch order, R long, unless said otherwise. The runner keeps each slot's page table;
    a plan carries only the pages that are new (or all of them, at `page_starts` 0, after a slot changed hands).
    """

    step: int
    mode: str  # ForwardMode value
    slots: list[int]
    prefix_lens: list[int]
    extend_lens: list[int]
    token_ids: list[int]  # [T] packed; -1 where the id is still on the device, in next_token_ids[slot]
    sample: list[bool]  # whether this step ends with a sampled token for the req (not a middle chunk)
    page_starts: dict[PoolGroup, list[int]]  # page-table column at which new_pages begins
    new_pages: dict[PoolGroup, list[list[int]]]  # 0 where a windowed group's page is gone: never read
    inits: list[SlotInit] = []
    adapter_writes: list[AdapterWrite] = []
    # Slots of the state pool, [] where the model has none: each row's state before this step (0: none yet), and after it.
    state_reads: list[int] = []
    state_writes: list[int] = []
    # First position in each extend whose input logprob is wanted, -1 for none; [] if no req wants any. Its hidden state, that
    # of the position before, is in the extend too (but for position 0, which has no distribution).
    logprob_starts: list[int] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The reqs of one step and its plan. `reqs[i]` is row i of the plan."""

    reqs: tuple[Req, ...]
    plan: StepPlan


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural log) at one position: the token's own, then the top alternatives, best first."""

    token_id: int
    logprob: float | None  # None: the first prompt token has no distribution
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class StepResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a step gave, on the host. Rows follow the plan's; S = 1 without speculation."""

    step: int
    token_ids: list[list[int]]  # [R, S]; row empty where `sample` was false
    num_accepted: list[int]  # [R] how many of token_ids[r] count
    logprobs: list[list[TokenLogprobs]] | None = None  # [R, S] for reqs that asked, [] for the others
    input_logprobs: list[list[TokenLogprobs]] | None = None  # [R] of the positions asked for in this extend


# What the engine process and its clients say to each other, msgspec over ZMQ (or a queue, in process).


class AddReq(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    rid: str
    input_ids: list[int]
    sampling: SamplingParams
    logprob: LogprobParams | None = None
    salt: str = ""
    priority: int = 0
    adapter: str = ""  # name of its LoRA adapter


class AbortReq(msgspec.Struct, frozen=True, tag=True):
    rid: str  # exact match; "" aborts every req


class FinishReqAt(msgspec.Struct, frozen=True, tag=True):
    """The detokenizer met a stop string: the req ends after `num_output_tokens` tokens."""

    rid: str
    num_output_tokens: int
    matched: str


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An adapter to load, or by its name one to unload."""

    name: str
    path: str = ""
    pinned: bool = False


class Control(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """A question to the engine, answered by one ControlReply with the same id."""

    id: int
    action: Literal["flush_cache", "stats", "info", "load_adapter", "unload_adapter", "shutdown"]
    adapter: AdapterSource | None = None  # of the two actions on adapters


class ControlReply(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    id: int
    ok: bool
    message: str = ""
    data: dict[str, object] = {}


class ReqOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """New tokens of one req; `finish_reason` is set on the last of them, exactly once a req."""

    rid: str
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = []
    input_logprobs: list[TokenLogprobs] = []


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent once by rank 0 when the model is loaded and the pools are allocated."""

    info: dict[str, object]


class EngineFailed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Sent when the engine cannot go on; every running req ends with it."""

    error: str
    detail: str = ""


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rank 0 to the others: read this adapter into host memory, beside the steps. A plan may name it from now on."""

    key: str
    path: str


class DropAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rank 0 to the others: no plan names this adapter any more until it is loaded again."""

    key: str


class OutputBatch(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Every req's news from one step, with the engine's gauges."""

    outputs: list[ReqOutput]
    stats: dict[str, float] = {}


ToEngine = AddReq | AbortReq | FinishReqAt | Control
ToFollower = StepPlan | LoadAdapter | DropAdapter
FromEngine = OutputBatch | ControlReply | EngineReady | EngineFailed

Stats = Mapping[str, float]
