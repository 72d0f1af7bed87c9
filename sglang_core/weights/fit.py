"""Does it fit? Plain arithmetic over bytes, done before anything is loaded: weights, KV, activations, headroom."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from sglang_core.errors import ConfigError
from sglang_core.layers.model_config import ModelConfig
from sglang_core.types import STATE
from sglang_core.weights.pool_sizes import PoolSizes

GIB = 2**30


def activation_bytes(
    cfg: ModelConfig, *, num_tokens: int, num_rows: int, itemsize: int, tp_size: int = 1, ep_size: int = 1
) -> int:
    """An upper guess of what one step holds at once: `num_tokens` through the widest layer, `num_rows` rows of logits.

    Counts what unfused ops keep: the stream and its residual, a layer's widest tensors twice (input and result) and once more
    in float32, and logits in float32 with a copy for sampling.
    """
    attention = 2 * (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim // tp_size
    mlp = 3 * cfg.intermediate_size // tp_size
    if cfg.moe is not None:  # a row for each expert that a token visits, in and out
        k, moe = cfg.moe.route.top_k, cfg.moe
        experts = 3 * k * moe.intermediate_size * ep_size // tp_size  # all rows may visit one rank's experts
        mlp = max(mlp, experts + 3 * moe.shared_size // tp_size + 3 * k * cfg.hidden_size)
    per_token = 3 * cfg.hidden_size * itemsize + max(attention, mlp) * (itemsize + 4)
    return num_tokens * per_token + num_rows * cfg.vocab_size * (itemsize + 2 * 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class FitTable:
    """How one rank's memory divides. All sizes in bytes.

    Of `total`, the share 1 - `mem_fraction` stays free as headroom; activations live in it, and more is set aside where they
    are larger. What is then left of `free` beside the weights is the KV pool.
    """

    device: str
    total: int
    free: int  # before loading
    mem_fraction: float
    weights: int
    activations: int
    pools: PoolSizes
    context_length: int
    max_total_tokens: int | None = None
    weights_note: str = ""  # what becomes of quantised ones
    context_asked: bool = True  # by the user; else a pool smaller than one full-length req is no error

    @property
    def headroom(self) -> int:
        return max(round((1 - self.mem_fraction) * self.total), self.activations)

    @property
    def kv(self) -> int:
        """Bytes left for KV; negative where the weights do not fit."""
        return self.free - self.weights - self.headroom

    @property
    def kv_tokens(self) -> int:
        """Tokens of the main pool, in whole pages; those of the others follow from it."""
        return self.pools.fitting(self.kv) * self.pools.page_size

    @property
    def largest_context(self) -> int:
        """The longest a single req may become here."""
        tokens = self.kv_tokens if self.max_total_tokens is None else min(self.kv_tokens, self.max_total_tokens)
        return min(tokens, self.context_length)

    @property
    def needed_tokens(self) -> int:
        return self.context_length if self.max_total_tokens is None else self.max_total_tokens

    def bytes_for(self, num_tokens: int) -> int:
        """Of all pools, where the main one holds so many tokens."""
        return self.pools.nbytes(-(-num_tokens // self.pools.page_size))

    def check(self) -> None:
        """Raises ConfigError, with the numbers and the way out, where weights or one full-length req do not fit."""
        have = (
            f"{self.device} has {_gib(self.free)} of {_gib(self.total)} free, weights take {_gib(self.weights)} "
            f"and {_gib(self.headroom)} stay free for activations (mem_fraction_static={self.mem_fraction:g})"
        )
        if not self.kv_tokens:
            raise ConfigError(
                f"the model does not fit: {have}. Use a larger --tp-size, a smaller model or dtype, "
                "or raise --mem-fraction-static"
            )
        if self.kv_tokens < self.needed_tokens and (self.context_asked or self.max_total_tokens is not None):
            setting = "context_length" if self.max_total_tokens is None else "max_total_tokens"
            raise ConfigError(
                f"{setting}={self.needed_tokens} needs {_gib(self.bytes_for(self.needed_tokens))} of KV and "
                f"{_gib(self.kv)} are left: {have}. Set --{setting.replace('_', '-')} to {self.kv_tokens} or less, "
                "or use a larger --tp-size"
            )

    def render(self) -> Table:
        """A table for a person."""
        table = Table(title=f"memory of {self.device}, a rank", title_justify="left")
        table.add_column("what")
        table.add_column("GiB", justify="right")
        table.add_column("note")
        rows = [
            ("total", self.total, ""),
            ("free now", self.free, ""),
            ("weights", self.weights, self.weights_note),
            ("headroom", self.headroom, f"activations need about {_gib(self.activations)}"),
            ("KV pools", max(self.kv, 0), f"{self.kv_tokens} tokens of {self.pools.bytes_per_token} bytes"),
            *self._pool_rows(),
            ("one req", self.bytes_for(self.context_length), f"{self.context_length} tokens, the context length"),
        ]
        for what, size, note in rows:
            table.add_row(what, f"{size / GIB:.2f}", note)
        table.add_row("largest context", "", str(self.largest_context))
        return table

    def _pool_rows(self) -> list[tuple[str, int, str]]:
        pools = self.pools
        if len(pools.specs) == 1:
            return []
        sizes = pools.pages(self.kv_tokens // pools.page_size)
        return [
            (f"- {group}", n * pools.specs[group].bytes_per_page, f"{n} {'slots' if group == STATE else 'pages'}")
            for group, n in sizes.items()
        ]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
