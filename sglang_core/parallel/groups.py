"""Rank arithmetic: which group a rank is in, and which slice of a dimension it holds."""

from __future__ import annotations

from dataclasses import dataclass, field

from sglang_core.backend.communicator import Communicator, LocalCommunicator
from sglang_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelContext:
    """The groups of this rank. Experts are dealt within the tensor-parallel one (`shard_experts`)."""

    tp: Communicator = field(default_factory=LocalCommunicator)

    @property
    def tp_rank(self) -> int:
        return self.tp.rank

    @property
    def tp_size(self) -> int:
        return self.tp.size


def tp_ranks(rank: int, tp_size: int) -> range:
    """The world ranks of the tensor-parallel group that `rank` is in: adjacent ones, as they share the fastest links."""
    first = rank - rank % tp_size
    return range(first, first + tp_size)


def even_shard(size: int, rank: int, num_ranks: int, what: str) -> tuple[int, int]:
    """The half-open slice of `[0, size)` that `rank` holds. Raises ConfigError where it does not divide."""
    if size % num_ranks:
        raise ConfigError(
            f"{what}={size} cannot be divided over tp_size={num_ranks}; set --tp-size to a divisor of {size}"
        )
    part = size // num_ranks
    return rank * part, (rank + 1) * part


def aligned_shard(size: int, rank: int, num_ranks: int, unit: int, what: str) -> tuple[int, int]:
    """The half-open slice of `[0, size)` that `rank` holds, cut between multiples of `unit` only.

    Even where that divides; else the first ranks hold a unit more than the last. Raises ConfigError where a rank would hold
    nothing, or where `unit` is 1 and `size` does not divide.
    """
    if size % (unit * num_ranks) == 0 or unit == 1:
        return even_shard(size, rank, num_ranks, what)
    units = -(-size // unit)
    if units < num_ranks:
        raise ConfigError(
            f"{what}={size} has {units} parts of {unit} that share a scale, too few for tp_size={num_ranks}; "
            f"set --tp-size to {units} or less"
        )
    whole, more = divmod(units, num_ranks)
    start = rank * whole + min(rank, more)
    return start * unit, min(size, (start + whole + (rank < more)) * unit)


def ragged_shard(size: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The half-open slice of `[0, size)` that `rank` holds; the last ranks may hold less, even nothing."""
    part = padded_part(size, num_ranks)
    return min(rank * part, size), min((rank + 1) * part, size)


def padded_part(size: int, num_ranks: int) -> int:
    """Length of every rank's part once `size` is padded up to divide."""
    return -(-size // num_ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertShard:
    """What a rank holds of a layer of experts: some of them, and of each the share of `rank` among `num_ranks`."""

    experts: range
    rank: int
    num_ranks: int


def shard_experts(num_experts: int, ep_size: int, rank: int, num_ranks: int) -> ExpertShard:
    """Deal whole experts to `ep_size` groups of adjacent ranks; the ranks of a group share the width of each of theirs.

    Raises ConfigError where ranks or experts do not divide, naming the sizes that do.
    """
    if num_ranks % ep_size or num_experts % ep_size:
        sizes = [n for n in range(1, num_ranks + 1) if num_ranks % n == 0 and num_experts % n == 0]
        raise ConfigError(
            f"ep_size={ep_size} does not divide tp_size={num_ranks} and the {num_experts} experts; "
            f"set --ep-size to {' or '.join(map(str, sizes))}"
        )
    in_group = num_ranks // ep_size
    first, stop = even_shard(num_experts, rank // in_group, ep_size, "experts")
    return ExpertShard(experts=range(first, stop), rank=rank % in_group, num_ranks=in_group)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadShard:
    """The heads a rank holds, as half-open ranges. KV heads are replicated where there are fewer than ranks."""

    q: tuple[int, int]
    kv: tuple[int, int]

    @property
    def num_heads(self) -> int:
        return self.q[1] - self.q[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv[1] - self.kv[0]


def shard_heads(num_heads: int, num_kv_heads: int, rank: int, num_ranks: int) -> HeadShard:
    """Deal query and KV heads so that each query head sits with the KV head it reads.

    Raises ConfigError where heads and ranks do not divide, naming the sizes that do.
    """
    kv_fits = num_kv_heads % num_ranks == 0 or num_ranks % num_kv_heads == 0
    if num_heads % num_ranks or not kv_fits:
        sizes = [
            n
            for n in range(1, num_heads + 1)
            if num_heads % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)
        ]
        raise ConfigError(
            f"num_attention_heads={num_heads}, num_key_value_heads={num_kv_heads} cannot be divided over "
            f"tp_size={num_ranks}; set --tp-size to one of {', '.join(map(str, sizes))}"
        )
    q = even_shard(num_heads, rank, num_ranks, "num_attention_heads")
    if num_ranks <= num_kv_heads:
        return HeadShard(q=q, kv=even_shard(num_kv_heads, rank, num_ranks, "num_key_value_heads"))
    kv_head = rank * num_kv_heads // num_ranks
    return HeadShard(q=q, kv=(kv_head, kv_head + 1))
