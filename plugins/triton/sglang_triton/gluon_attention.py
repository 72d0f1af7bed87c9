"""Attention by kernels of our own in Gluon: how those of `hopper_attention` and `blackwell_attention` are launched, and compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sglang_core.api.ops import AttnSpec, RaggedBatch
from sglang_triton.aot_spec import AotSpec
from sglang_triton.attention import Tile
from sglang_triton.attention_aot import spec_of, unsplit
from sglang_triton.attention_launch import scale_of
from sglang_triton.attention_plan import WorkPlan
from sglang_triton.hopper_kernels import CHUNK
from sglang_triton.rows import as_heads

STAGES = 2  # blocks that are in shared memory at once
WARPS = 4  # of the first group; the launch adds the second's and the others'
ALIGN = 16  # bytes: of rows that TMA copies
LAYOUT = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What sets an architecture's kernels apart."""

    arch: str
    name: str  # of the provider
    rows: int  # of a program
    keys: Callable[[AttnSpec], int]  # of a block: what shared memory has room for STAGES of beside the queries
    instructions: tuple[str, ...]  # that its assembly must have


def attend_items(kernel: Any, form: Form, q: Tensor, tile: Tile, spec: AttnSpec, plan: WorkPlan, i: int) -> None:
    """The tier `i` of the plan, of tiles of at most `form.rows` rows. q: [T, Hq, D]."""
    tier, static, keys = plan.static.tiers[i], plan.static, form.keys(spec)
    k, v = (leaf.flatten(0, 1) for leaf in (tile.store.k, tile.store.v))
    box = min(static.page_size, keys)
    (k_desc, k_head), (v_desc, v_head) = descriptor(k, box, CHUNK.value), descriptor(v, box, spec.v_head_dim)
    kernel[(tier.capacity * spec.num_kv_heads,)](
        q, q.stride(0), q.stride(1), k_desc, v_desc, k_head, v_head, plan.page_table, static.num_pages,
        tile.o, tile.lse, tile.part_o, tile.part_lse, scale_of(spec), plan.work, i, tier.first,
        NUM_KV_HEADS=spec.num_kv_heads, PAGE=static.page_size, SPLIT=tile.part_o is not None,
        **constexprs(spec, keys, lse=tile.lse is not None), num_warps=WARPS,
    )  # fmt: skip


def attend_packed(
    kernel: Any, form: Form, q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, o: Tensor, sums: Tensor | None, spec: AttnSpec
) -> None:  # fmt: skip
    """As `attention.attend_packed`."""
    if not k.shape[0]:  # nothing that TMA could describe, and nothing to attend to
        return
    q, num_reqs, group, keys = (
        as_heads(q),
        batch.cu_q.shape[0] - 1,
        spec.num_heads // spec.num_kv_heads,
        form.keys(spec),
    )
    num_tiles = triton.cdiv(batch.max_q, form.rows // group)
    (k_desc, k_head), (v_desc, v_head) = descriptor(k, keys, CHUNK.value), descriptor(v, keys, spec.v_head_dim)
    kernel[(num_tiles * num_reqs * spec.num_kv_heads,)](
        q, q.stride(0), q.stride(1), k_desc, v_desc, k_head, v_head, batch.cu_q, batch.cu_k, o, sums, scale_of(spec), num_reqs, num_tiles,
        GROUP=group, **constexprs(spec, keys, lse=sums is not None), num_warps=WARPS,
    )  # fmt: skip


def constexprs(spec: AttnSpec, keys: int, *, lse: bool) -> dict[str, Any]:
    return {
        "NUM_HEADS": spec.num_heads,
        "W": spec.head_dim,
        "WV": spec.v_head_dim,
        "N": keys,
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


def packed_spec(kernel: Any, form: Form, name: str, spec: AttnSpec) -> AotSpec:
    return _spec("attn.ragged", kernel, form, name, spec, box=form.keys(spec),
        more=dict.fromkeys(("cu_q", "cu_k"), "*i32") | dict.fromkeys(("num_reqs", "num_tiles"), "i32"),
        constants={"GROUP": spec.num_heads // spec.num_kv_heads},
    )  # fmt: skip


def items_spec(kernel: Any, form: Form, name: str, spec: AttnSpec, *, page: int) -> AotSpec:
    return _spec("attn.paged", kernel, form, name, spec, box=min(page, form.keys(spec)),
        more=dict.fromkeys(("part_o", "part_lse"), "*fp32") | dict.fromkeys(("table", "work"), "*i32")
        | dict.fromkeys(("num_pages", "counter", "items"), "i32"),
        constants={"PAGE": page, "NUM_KV_HEADS": spec.num_kv_heads, "SPLIT": True},
    )  # fmt: skip


def _spec(
    op: str, kernel: Any, form: Form, name: str, spec: AttnSpec, *, box: int, more: dict[str, str], constants: dict[str, Any]
) -> AotSpec:  # fmt: skip
    """`box`: keys that TMA copies at once."""
    boxes = {"k_desc": CHUNK.value, "v_desc": spec.v_head_dim}
    return AotSpec(
        op=op,
        name=f"{form.name}, {name}",
        kernel=kernel,
        signature={
            **{key: f"tensordesc<bf16[{box},{columns}],{LAYOUT!r}>" for key, columns in boxes.items()},
            **dict.fromkeys(("q_token", "q_head", "k_head", "v_head"), "i32"),
            **POINTERS,
            **more,
        },
        constexprs=constexprs(spec, form.keys(spec), lse=True) | constants,
        fixed={"num_warps": WARPS},
        odd=("num_reqs", "num_tiles", "num_pages", "counter", "items"),
        instructions={form.arch: form.instructions},
        archs=(form.arch,),
    )


def form_specs(packed: Any, items: Any, form: Form) -> tuple[AotSpec, ...]:
    """What models that people serve have, as they would launch them."""
    return (
        packed_spec(packed, form, "causal, D=128", spec_of(32, 8, 128)),
        packed_spec(packed, form, "D=64", spec_of(16, 16, 64, causal=False)),
        packed_spec(packed, form, "D=192 to 128, causal", spec_of(16, 16, 192, v_head_dim=128)),
        items_spec(items, form, "causal, D=128, page of 64", spec_of(32, 8, 128), page=64),
        items_spec(items, form, "causal, D=128, page of 16", spec_of(28, 4, 128), page=16),
        unsplit(items_spec(items, form, "causal, D=64, page of 256", spec_of(64, 8, 64), page=256)),
    )
