"""Products of rows with weights, by tiles, in Pallas: the codes of a weight leave HBM as they are and are widened beside the MXU.

A tile is some rows that meet one matrix of a stack; which, is prefetched. So the same kernel is a linear layer (one matrix) and a grouped
product, whose tiles read the experts that have rows and no other. All columns of a tile's rows lie in VMEM at once; the grid walks output
columns, and within them tiles: a block of weights is read once for all tiles in a row that want it.

On a host the kernel runs in Pallas' interpreter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sglang_core.api.ops import Fmt
from sglang_tpu.activations import Rows
from sglang_tpu.hlo import READS
from sglang_tpu.weights import CHUNKS, LANES, PARTS, ceil_to, chunk_of

SUBLANES = 32  # heights of a linear layer's tiles are multiples: 8-bit rows lie so in registers
VMEM_LIMIT = 48 << 20  # of the 64 MiB that the smallest of these devices has
ROWS_BYTES = 6 << 20  # of a tile's rows at most
MAX_BLOCK = 1024  # of output columns
INT4_ZERO = 8
MAGIC = 128  # 0x4300 | n is the bfloat16 number 128 + n
BY_ROWS = (((1,), (1,)), ((), ()))  # x: [h, k], w: [n, k] -> [h, n]


class Tiles(NamedTuple):
    """Rows in tiles of `height`, each with the matrix it meets. Those from `count` on have none, and their results are undefined."""

    height: int
    expert: jax.Array  # int32[tiles]; from `count` on the last one before it, or 0
    count: jax.Array  # int32[1], at least 1


def whole(rows: int, columns: int, itemsize: int) -> Tiles:
    """Tiles of rows that all meet one matrix: as few as VMEM allows, or up to twice as many where those leave no row of the last one empty.

    To fill rows up, and to cut a result, are copies.
    """
    most = max(SUBLANES, ROWS_BYTES // (columns * itemsize) // SUBLANES * SUBLANES)
    fewest = -(-rows // most)
    count = next((n for n in range(fewest, 2 * fewest) if rows % (n * SUBLANES) == 0), fewest)
    height = ceil_to(-(-rows // count), SUBLANES)
    return Tiles(height, jnp.zeros(count, jnp.int32), jnp.full(1, count, jnp.int32))


def product(
    rows: Rows,
    w: Mapping[str, jax.Array],
    bias: jax.Array | None,
    tiles: Tiles,
    *,
    fmt: Fmt,
    out_features: int,
    dtype: Any,
    block_bytes: int,
) -> jax.Array:
    """rows: [tiles * height, in] (fewer are filled up), w: a stack in tiles (`weights.py`) or dense [X, out, in], bias: [X, out]
    -> [tiles * height, out].

    Sums in float32 (int8 in int32), scales, adds the bias, rounds to `dtype`. `block_bytes`: of weights that a step of the grid reads.
    """
    total = tiles.expert.shape[0] * tiles.height
    columns = w["weight"].shape[-1] if _by_rows(fmt) else w["weight"].shape[-2] * 8
    width = out_features if fmt.is_dense else ceil_to(out_features, LANES)
    by_rows = _by_rows(fmt) and columns % LANES == 0
    if fmt.is_dense and not by_rows:  # XLA keeps a matrix of broken rows by columns: this takes it as it lies
        w = {**w, "weight": w["weight"].swapaxes(1, 2)}
    given = {
        "x": _filled(rows.x, total, columns),
        "x_scale": None if rows.scale is None else _filled(rows.scale, total, rows.scale.shape[1]),
        "x_zero": None if rows.zero is None else _filled(rows.zero, total, 1),
        "bias": None if bias is None else _filled(bias, bias.shape[0], width)[:, None],
    } | {name: tensor for name, tensor in w.items() if name != "x_scale"}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    made = _product(
        given,
        tiles.expert,
        tiles.count,
        fmt=fmt,
        height=tiles.height,
        block=_block(width, w["weight"].nbytes // (w["weight"].shape[0] * width), block_bytes),
        width=width,
        by_rows=by_rows,
        dtype=jnp.dtype(dtype),
    )
    return made[:, :out_features]


def _by_rows(fmt: Fmt) -> bool:
    """Whether a weight lies [out, in]."""
    return fmt.element in ("dense", "fp8", "int8")


def _filled(x: jax.Array, rows: int, columns: int) -> jax.Array:
    missing = (rows - x.shape[0], columns - x.shape[1])
    return x if missing == (0, 0) else jnp.pad(x, ((0, missing[0]), (0, missing[1])))


def _block(width: int, column_bytes: int, block_bytes: int) -> int:
    """Output columns of a step of the grid."""
    fits = max(LANES, block_bytes // column_bytes // LANES * LANES)
    return min(width, fits, MAX_BLOCK)


@partial(jax.jit, static_argnames=("fmt", "height", "block", "width", "by_rows", "dtype"))
def _product(
    given: dict[str, jax.Array],
    expert: jax.Array,
    count: jax.Array,
    *,
    fmt: Fmt,
    height: int,
    block: int,
    width: int,
    by_rows: bool,
    dtype: Any,
) -> jax.Array:
    def of_rows(n: Any, t: Any, expert: Any, count: Any) -> tuple[Any, ...]:
        return jnp.minimum(t, count[0] - 1), 0

    def of_result(n: Any, t: Any, expert: Any, count: Any) -> tuple[Any, ...]:
        return jnp.minimum(t, count[0] - 1), n

    def of_matrix(n: Any, t: Any, expert: Any, count: Any) -> tuple[Any, ...]:
        return expert[t], n, 0

    def of_columns(n: Any, t: Any, expert: Any, count: Any) -> tuple[Any, ...]:
        return expert[t], 0, n

    specs = {}
    for name, tensor in given.items():
        if name in ("x", "x_scale", "x_zero"):
            specs[name] = pl.BlockSpec((height, tensor.shape[1]), of_rows)
        elif name == "weight" and by_rows:
            specs[name] = pl.BlockSpec((None, block, tensor.shape[2]), of_matrix)
        else:
            specs[name] = pl.BlockSpec((None, tensor.shape[1], block), of_columns)
    rows, columns = given["x"].shape
    reads = {name: _reads(name, given[name], expert.shape[0], pl.cdiv(width, block)) for name in sorted(given)}
    call = partial(
        pl.pallas_call,
        partial(_kernel, fmt=fmt, by_rows=by_rows),
        out_shape=jax.ShapeDtypeStruct((rows, width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(width, block), expert.shape[0]),
            in_specs=[specs],
            out_specs=pl.BlockSpec((height, block), of_result),
            scratch_shapes=[
                pltpu.VMEM((height, block), jnp.int32 if fmt.element == "int8" else jnp.float32),
                {name: pltpu.VMEM((given[name].shape[1], block), jnp.float32) for name in _narrow(given)},
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * columns * width,
            bytes_accessed=sum(reads.values()) + rows * width * dtype.itemsize,
            transcendentals=0,
        ),
        metadata={READS: json.dumps([expert.nbytes, count.nbytes, *reads.values()])},
        name=f"product_{fmt.name}",
    )
    made: jax.Array = lax.platform_dependent(expert, count, given, cpu=call(interpret=True), default=call())
    return made


def _reads(name: str, tensor: jax.Array, num_tiles: int, num_blocks: int) -> int:
    """Bytes that a call reads of a tensor at most. A block of rows or of a matrix stays while neighbours in the grid want it."""
    if name in ("x", "x_scale", "x_zero"):
        return tensor.nbytes * (num_blocks if num_tiles > 1 else 1)
    matrices = tensor.shape[0]
    return tensor.nbytes // matrices * min(matrices, num_tiles)


def _narrow(given: Mapping[str, Any]) -> list[str]:
    """What groups have in 8 bits, whose rows cannot be taken one by one."""
    return [name for name in ("scale", "zero") if name in given and given[name].dtype.itemsize == 1]


def _kernel(
    expert: Any,
    count: Any,
    given: dict[str, Any],
    y: Any,
    total: Any,
    widened: dict[str, Any],
    *,
    fmt: Fmt,
    by_rows: bool,
) -> None:
    del expert
    has_rows = pl.program_id(1) < count[0]

    @pl.when(has_rows)
    def _() -> None:
        columns = given["x"].shape[1]
        chunk = chunk_of(columns) if columns % CHUNKS[-1] == 0 else columns
        for name, table in widened.items():
            table[...] = _WIDE[given[name].dtype.name, name](given[name][...])
        add_codes = _add_by_columns if fmt.is_dense and not by_rows else _ADD[fmt.element]
        add = partial(add_codes, given | widened, total, chunk=chunk, fmt=fmt)
        total[...] = jnp.zeros_like(total)
        if columns == chunk:
            add(0)
        else:
            lax.fori_loop(0, columns // chunk, lambda i, _: add(i), None)
        y[...] = _finished(given, total[...], fmt).astype(y.dtype)


def _of_e8m0(x: jax.Array) -> jax.Array:
    """2 ** (x - 127), of 255 NaN; float32."""
    exponent = x.astype(jnp.int32)
    bits = jnp.where(exponent == 0, 1 << 22, jnp.where(exponent == 255, 0x7FC00000, exponent << 23))
    return lax.bitcast_convert_type(bits, jnp.float32)


# What the 8 bits of a group stand for, by their dtype and the tensor's name.
_WIDE = {
    ("uint8", "zero"): lambda x: x.astype(jnp.int32).astype(jnp.float32),
    ("uint8", "scale"): _of_e8m0,
    ("float8_e4m3fn", "scale"): lambda x: x.astype(jnp.float32),
}


def _finished(given: dict[str, Any], total: jax.Array, fmt: Fmt) -> jax.Array:
    """Sums of codes -> the numbers they stand for, as far as each column's and each row's scale goes, and the bias."""
    if "x_zero" in given:
        total = total - given["x_zero"][...] * given["column_sum"][...]
    y = total.astype(jnp.float32)
    if "x_scale" in given and fmt.activation != "fp8_block":
        y = y * given["x_scale"][...]
    if "scale" in given and fmt.group in (None, -1):
        y = y * given["scale"][...]
    if "global_scale" in given:
        y = y * given["global_scale"][...]
    return y + given["bias"][...].astype(jnp.float32) if "bias" in given else y


def _dot(x: jax.Array, w: jax.Array, dims: Any = (((1,), (0,)), ((), ()))) -> jax.Array:
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, w, dims, preferred_element_type=sums, precision=precision)


def _columns(i: Any, size: int) -> Any:
    """The i-th run of so many columns or rows."""
    return pl.ds(i if size == 1 else pl.multiple_of(i * size, size), size)


# What a chunk of columns adds to the sums, by the kind of codes.


def _add_plain(given: dict[str, Any], total: Any, i: Any, *, chunk: int, fmt: Fmt) -> None:
    x, w = given["x"], given["weight"]
    if fmt.group is None:
        at = _columns(i, chunk) if isinstance(i, jax.Array) else slice(None)
        total[...] += _dot(x[:, at], w[:, at], BY_ROWS)
        return
    groups = chunk // fmt.group
    for g in range(groups):
        at = _columns(i * groups + g, fmt.group)
        part = _dot(x[:, at], w[:, at], BY_ROWS) * given["scale"][_columns(i * groups + g, 1), :]
        total[...] += part * _column(given["x_scale"], i * groups + g)


def _add_by_columns(given: dict[str, Any], total: Any, i: Any, *, chunk: int, fmt: Fmt) -> None:
    """Of a dense matrix [in, out], whole: its rows do not divide into chunks."""
    total[...] += _dot(given["x"][...], given["weight"][...])


def _column(x: Any, i: Any) -> jax.Array:
    """x: [h, n] -> [h, 1], its i-th: a sum over lanes, which take no index."""
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane == i, x[...], 0.0).sum(1, keepdims=True)


def _add_int4(given: dict[str, Any], total: Any, i: Any, *, chunk: int, fmt: Fmt) -> None:
    """Groups as long as the MXU is deep are scaled as sums, with zeros taken from the sums too; of shorter ones each weight is."""
    x = given["x"][:, _columns(i, chunk)]
    word = given["weight"][_columns(i, chunk // 8), :]
    codes = jnp.concatenate([_int4_part(word, part) for part in range(PARTS)])  # 128 + code: [chunk, n]
    if fmt.group != LANES:
        total[...] += _dot(x, _scaled_int4(given, codes, i, fmt).astype(x.dtype))
        return
    offset = MAGIC
    if x.dtype == jnp.float32:  # which has not the digits to spare
        codes, offset = codes.astype(jnp.float32) - (MAGIC + INT4_ZERO), -INT4_ZERO
    groups = chunk // LANES
    for g in range(groups):
        at, row = slice(g * LANES, (g + 1) * LANES), _columns(i * groups + g, 1)
        zero = given["zero"][row, :] if "zero" in given else float(INT4_ZERO)
        of_zero = x[:, at].astype(jnp.float32).sum(1, keepdims=True) * (zero + offset)
        total[...] += (_dot(x[:, at], codes[at]) - of_zero) * given["scale"][row, :]


def _int4_part(word: jax.Array, part: int) -> jax.Array:
    """word: int32[n / 8, m] -> bfloat16[n / 4, m], 128 more than the codes."""
    bits = (lax.shift_right_logical(word, jnp.int32(4 * part)) & 0x000F000F) | 0x43004300
    return pltpu.bitcast(bits, jnp.bfloat16)


def _scaled_int4(given: dict[str, Any], codes: jax.Array, i: Any, fmt: Fmt) -> jax.Array:
    """The weights of a chunk, float32; where a column has one scale, it comes later."""
    zero = _spread(given["zero"], codes, i, fmt) if "zero" in given else float(INT4_ZERO)
    value = codes.astype(jnp.float32) - (zero + MAGIC)
    return value if fmt.group == -1 else value * _spread(given["scale"], codes, i, fmt)


def _spread(x: Any, like: jax.Array, i: Any, fmt: Fmt) -> jax.Array:
    """x: [groups, n] -> float32[chunk, n], what belongs to each weight of the i-th chunk."""
    chunk, width = like.shape
    if fmt.group == -1:
        return x[...].astype(jnp.float32)
    assert fmt.group is not None
    groups = chunk // fmt.group
    found = x[_columns(i, groups), :][:, None]
    return jnp.broadcast_to(found, (groups, fmt.group, width)).reshape(chunk, width)


def _add_e2m1(given: dict[str, Any], total: Any, i: Any, *, chunk: int, fmt: Fmt) -> None:
    """With the scale of its group a weight is a bfloat16 number still."""
    x = given["x"][:, _columns(i, chunk)]
    word = given["weight"][_columns(i, chunk // 8), :]
    value = jnp.concatenate([_e2m1_part(word, part) for part in range(PARTS)])
    total[...] += _dot(x, (value * _spread(given["scale"], value, i, fmt)).astype(x.dtype))


def _e2m1_part(word: jax.Array, part: int) -> jax.Array:
    """word: int32[n / 8, m] -> float32[n / 4, m].

    Exponent and mantissa of a code, put where bfloat16 has them, make t. That is the number from 1 on; below, where e2m1 has no hidden
    bit, it is 2 t - 1.
    """
    bits = lax.shift_right_logical(word, jnp.int32(4 * part))
    sign = pltpu.bitcast(((bits & 0x00080008) << 12) | 0x3F803F80, jnp.bfloat16).astype(jnp.float32)
    t = pltpu.bitcast(((bits & 0x00070007) << 6) + 0x3F003F00, jnp.bfloat16).astype(jnp.float32)
    return sign * jnp.minimum(t, 2 * t - 1)


_ADD = {
    "dense": _add_plain,
    "fp8": _add_plain,
    "int8": _add_plain,
    "int4": _add_int4,
    "e2m1": _add_e2m1,
}
