"""What configs may be, and which are worth a try: the space that `sglang-core tune` goes through.

A knob varies only what its config in force has: the interpreter knows no warps. Sizes that a config is looked up by are bounds where
they grow with the batch, else they must be equal: what is best for one shape of weights says little of another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import triton

from sglang_triton.packed import BLOCK, FEW, format_constexprs

Sizes = Mapping[str, Any]
Config = Mapping[str, Any]
LANES = 32  # of a warp. AMD's waves have 64, and registers for as many sums a lane: there the bounds are half as tight
SUMS = (4, 256)  # float32 sums a thread may hold: fewer leave units idle, more spill

_WARPS = {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4, 5)}
_GEMM = {"BLOCK_T": (16, 32, 64, 128), "BLOCK_N": (32, 64, 128, 256), **_WARPS}
_PARTS = {"PARTS": (1, 4, 8), "BLOCK_N": (32, 64), "num_warps": (4, 8), "num_stages": (2, 3, 4)}
_ATTENTION = {"M": (16, 32, 64, 128), "N": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3, 4)}


def gemm_fits(config: Config, sizes: Sizes) -> bool:
    """No taller than there are rows, as many rows an expert where there are experts; a tile's sums in registers."""
    rows = sizes["T"] if "T" in sizes else max(1, 2 * sizes["S"] // sizes["X"])
    tall = config["BLOCK_T"] > max(16, triton.next_power_of_2(rows))
    wide = config["BLOCK_N"] > max(32, triton.next_power_of_2(sizes["N"]))
    return not tall and not wide and _sums(config["BLOCK_T"] * config["BLOCK_N"], config)


def gemm_shared(config: Config, sizes: Sizes) -> int:
    """Bytes of tiles that wait while one is worked on."""
    columns = int(format_constexprs(sizes["FMT"], sizes["K"])["BLOCK_K"])  # type: ignore[call-overload]
    bits = sizes["BITS"]
    x_bits = 8 if bits == 8 else 16
    tile = columns * (config["BLOCK_T"] * x_bits + config["BLOCK_N"] * bits) // 8
    return tile * (config.get("num_stages", 1) - 1)


def parts_fit(config: Config, sizes: Sizes) -> bool:
    """Parts of whole groups, a warp each. One part is none of it, and then the rest says nothing: one of those is enough."""
    parts = config["PARTS"]
    if parts == 1:
        return config["BLOCK_N"] == min(_PARTS["BLOCK_N"]) and config.get("num_stages", 2) == 2
    return sizes["K"] % (BLOCK * parts) == 0 and config.get("num_warps", parts) == parts


def parts_shared(config: Config, sizes: Sizes) -> int:
    tile = BLOCK * (FEW * 16 + config["BLOCK_N"] * 4) // 8
    return config["PARTS"] * tile * (config.get("num_stages", 1) - 1)


def attention_fits(config: Config, sizes: Sizes) -> bool:
    """No more rows than a tile has; its sums in registers."""
    return config["M"] <= sizes["ROWS"] and _sums(config["M"] * max(sizes["D"], config["N"]), config)


def attention_shared(config: Config, sizes: Sizes) -> int:
    return 2 * config["N"] * sizes["D"] * sizes["STORED"] // 8 * (config.get("num_stages", 1) - 1)


def latent_shared(config: Config, sizes: Sizes) -> int:
    """Latents are keys and values at once."""
    return attention_shared(config, sizes) // 2


def _sums(count: int, config: Config) -> bool:
    least, most = SUMS
    return "num_warps" not in config or least <= count // (config["num_warps"] * LANES) <= most


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Of an op's configs. `grows`: sizes that are bounds. `shared`: bytes of shared memory that a config takes at least."""

    axes: Mapping[str, tuple[int, ...]]
    grows: tuple[str, ...] = ()
    fits: Callable[[Config, Sizes], bool]
    shared: Callable[[Config, Sizes], int]

    def candidates(self, in_force: Config, sizes: Sizes) -> Iterator[Config]:
        """Every config of the space that makes sense, but for the one in force; what is no axis stays."""
        names = [name for name in self.axes if name in in_force]
        for values in itertools.product(*(self.axes[name] for name in names)):
            config = dict(in_force) | dict(zip(names, values, strict=True))
            if config != dict(in_force) and self.fits(config, sizes):
                yield config


SPACES = {
    "gemm.linear": Space(axes=_GEMM, grows=("T",), fits=gemm_fits, shared=gemm_shared),
    "gemm.parts": Space(axes=_PARTS, fits=parts_fit, shared=parts_shared),
    "moe.fused": Space(axes=_GEMM, grows=("S",), fits=gemm_fits, shared=gemm_shared),
    "attn.paged": Space(axes=_ATTENTION, fits=attention_fits, shared=attention_shared),
    "attn.mla_paged": Space(axes=_ATTENTION, fits=attention_fits, shared=latent_shared),
}
