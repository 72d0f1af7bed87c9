"""Attention for Hopper: what the kernels of `hopper_kernels` are launched with. The provider `hopper`, which is taken where it is asked for."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sglang_core.api import Pool
from sglang_core.api.ops import AttnSpec, RaggedBatch
from sglang_triton import attention
from sglang_triton.aot_spec import AotSpec
from sglang_triton.attention import Tile
from sglang_triton.attention_aot import spec_of, unsplit
from sglang_triton.attention_launch import scale_of
from sglang_triton.attention_plan import WorkPlan
from sglang_triton.hopper_kernels import CHUNK, GROUPS, ROWS, _attend_items_hopper, _attend_packed_hopper
from sglang_triton.rows import as_heads

M = GROUPS.value * ROWS.value  # rows of a program
KEYS = 128  # of a block
STAGES = 2  # blocks that are in shared memory at once; queries and blocks of 192 and 128 dims take 213 of its 227 KiB
WARPS = 4  # of the first group; the launch adds the second's and the loader's
ALIGN = 16  # bytes: of rows that TMA copies
LAYOUT = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def paged(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    pool: Pool,
    layer: int,
    spec: AttnSpec,
    plan: WorkPlan,
    *,
    sinks: Tensor | None = None,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D] -> o: [T, Hq, Dv] (, lse: float32[T, Hq]). Writes k and v first. Short extends are Triton's."""
    return attention.paged(q, k, v, pool, layer, spec, plan, sinks=sinks, lse=lse, wide=attend_items)


def attend_items(q: Tensor, tile: Tile, spec: AttnSpec, plan: WorkPlan, i: int) -> None:
    """The tier `i` of the plan, of tiles of M rows. q: [T, Hq, D]."""
    tier, static = plan.static.tiers[i], plan.static
    k, v = (leaf.flatten(0, 1) for leaf in (tile.store.k, tile.store.v))
    box = min(static.page_size, KEYS)
    (k_desc, k_head), (v_desc, v_head) = descriptor(k, box, CHUNK.value), descriptor(v, box, spec.v_head_dim)
    _attend_items_hopper[(tier.capacity * spec.num_kv_heads,)](
        q, q.stride(0), q.stride(1), k_desc, v_desc, k_head, v_head, plan.page_table, static.num_pages,
        tile.o, tile.lse, tile.part_o, tile.part_lse, scale_of(spec), plan.work, i, tier.first,
        NUM_KV_HEADS=spec.num_kv_heads, PAGE=static.page_size, SPLIT=tile.part_o is not None,
        **constexprs(spec, lse=tile.lse is not None), num_warps=WARPS,
    )  # fmt: skip


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: RaggedBatch,
    spec: AttnSpec,
    *,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [Tk, Hk, D], v: [Tk, Hk, Dv] -> o: [T, Hq, Dv] (, lse: float32[T, Hq])."""
    return attention.ragged(q, k, v, batch, spec, lse=lse, launch=attend_packed)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, o: Tensor, sums: Tensor | None, spec: AttnSpec
) -> None:
    """As `attention.attend_packed`."""
    if not k.shape[0]:  # nothing that TMA could describe, and nothing to attend to
        return
    q, num_reqs, group = as_heads(q), batch.cu_q.shape[0] - 1, spec.num_heads // spec.num_kv_heads
    num_tiles = triton.cdiv(batch.max_q, M // group)
    (k_desc, k_head), (v_desc, v_head) = descriptor(k, KEYS, CHUNK.value), descriptor(v, KEYS, spec.v_head_dim)
    _attend_packed_hopper[(num_tiles * num_reqs * spec.num_kv_heads,)](
        q, q.stride(0), q.stride(1), k_desc, v_desc, k_head, v_head, batch.cu_q, batch.cu_k, o, sums, scale_of(spec), num_reqs, num_tiles,
        GROUP=group, **constexprs(spec, lse=sums is not None), num_warps=WARPS,
    )  # fmt: skip


def constexprs(spec: AttnSpec, *, lse: bool) -> dict[str, Any]:
    return {
        "NUM_HEADS": spec.num_heads,
        "W": spec.head_dim,
        "WV": spec.v_head_dim,
        "N": KEYS,
        "STAGES": STAGES,
        "CAUSAL": spec.causal,
        "LSE": lse,
    }


def descriptor(x: Tensor, rows: int, columns: int) -> tuple[TensorDescriptor, int]:
    """x: [T, H, D] as a matrix that TMA copies boxes of `rows` by `columns` from, and how many columns a head is apart.

    A copy of x where its rows do not lie as TMA takes them.
    """
    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    steps = [step * x.element_size() % ALIGN for step in x.stride()[:2]]
    if x.stride(2) != 1 or x.stride(0) < width or any(steps) or x.data_ptr() % ALIGN:
        x = x.clone(memory_format=torch.contiguous_format)
        width = x.shape[1] * x.shape[2]
    flat = x.as_strided((x.shape[0], width), (x.stride(0), 1))
    return TensorDescriptor.from_tensor(flat, [rows, columns], LAYOUT), x.stride(1)


POINTERS = {"q": "*bf16", "o": "*bf16", "lse": "*fp32", "scale": "fp32"}
INSTRUCTIONS = ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "mbarrier.try_wait")


def hopper_spec(op: str, name: str, spec: AttnSpec, *, page: int = 0) -> AotSpec:
    """`page`: 0 of packed rows."""
    box = min(page, KEYS) or KEYS
    boxes = {"k_desc": CHUNK.value, "v_desc": spec.v_head_dim}
    more: dict[str, str] = dict.fromkeys(("cu_q", "cu_k"), "*i32") | dict.fromkeys(("num_reqs", "num_tiles"), "i32")
    if page:
        more = dict.fromkeys(("part_o", "part_lse"), "*fp32") | dict.fromkeys(("table", "work"), "*i32")
        more |= dict.fromkeys(("num_pages", "counter", "items"), "i32")
    return AotSpec(
        op=op,
        name=f"hopper, {name}",
        kernel=_attend_items_hopper if page else _attend_packed_hopper,
        signature={
            **{key: f"tensordesc<bf16[{box},{columns}],{LAYOUT!r}>" for key, columns in boxes.items()},
            **dict.fromkeys(("q_token", "q_head", "k_head", "v_head"), "i32"),
            **POINTERS,
            **more,
        },
        constexprs=constexprs(spec, lse=True)
        | (
            {"PAGE": page, "NUM_KV_HEADS": spec.num_kv_heads, "SPLIT": True}
            if page
            else {"GROUP": spec.num_heads // spec.num_kv_heads}
        ),
        fixed={"num_warps": WARPS},
        odd=("num_reqs", "num_tiles", "num_pages", "counter", "items"),
        instructions={"sm_90": INSTRUCTIONS},
        archs=("sm_90",),
    )


AOT = (
    hopper_spec("attn.ragged", "causal, D=128", spec_of(32, 8, 128)),
    hopper_spec("attn.ragged", "D=64", spec_of(16, 16, 64, causal=False)),
    hopper_spec("attn.ragged", "D=192 to 128, causal", spec_of(16, 16, 192, v_head_dim=128)),
    hopper_spec("attn.paged", "causal, D=128, page of 64", spec_of(32, 8, 128), page=64),
    hopper_spec("attn.paged", "causal, D=128, page of 16", spec_of(28, 4, 128), page=16),
    unsplit(hopper_spec("attn.paged", "causal, D=64, page of 256", spec_of(64, 8, 64), page=256)),
)
