"""attn.ragged for Hopper: what the kernel of `hopper_kernels` is launched with. The provider `hopper`, which is taken where it is asked for."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sglang_core.api.ops import AttnSpec
from sglang_triton.aot_spec import AotSpec
from sglang_triton.attention_aot import spec_of
from sglang_triton.hopper_kernels import CHUNK, GROUPS, ROWS, _attend_hopper

M = GROUPS.value * ROWS.value  # queries of a program
BOXES = CHUNK.value  # dims of queries and keys that are copied at once
KEYS = 128  # of a block
STAGES = 2  # blocks that are in shared memory at once; queries and blocks of 192 and 128 dims take 213 of its 227 KiB
WARPS = 4  # of the first group; the launch adds the second's and the loader's
ALIGN = 16  # bytes: of rows that TMA copies
LAYOUT = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    spec: AttnSpec,
    *,
    max_q: int,
    max_k: int,
    lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """q: [T, Hq, D], k: [Tk, Hk, D], v: [Tk, Hk, Dv], cu_q, cu_k: int32[R + 1] -> o: [T, Hq, Dv] (, lse: float32[T, Hq]).

    max_k is not needed: programs look at the lengths themselves.
    """
    tokens, heads, num_reqs = q.shape[0], spec.num_heads, cu_q.shape[0] - 1
    # Rows of no req: how many there are is known on the device only.
    o = q.new_zeros(tokens, heads, spec.v_head_dim)
    sums = torch.full((tokens, heads), float("-inf"), dtype=torch.float32, device=q.device) if lse else None
    if o.numel() and k.shape[0] and max_q and num_reqs:
        num_tiles = triton.cdiv(max_q, M)
        (q_desc, q_head), (k_desc, k_head) = descriptor(q, M // GROUPS.value, BOXES), descriptor(k, KEYS, BOXES)
        v_desc, v_head = descriptor(v, KEYS, spec.v_head_dim)
        _attend_hopper[(num_tiles * num_reqs * heads,)](
            q_desc, k_desc, v_desc, q_head, k_head, v_head, cu_q, cu_k, o, sums, spec.scale / math.log(2.0), num_reqs, num_tiles,
            NUM_HEADS=heads, GROUP=heads // spec.num_kv_heads, W=spec.head_dim, WV=spec.v_head_dim, N=KEYS, STAGES=STAGES,
            CAUSAL=spec.causal, LSE=lse, num_warps=WARPS,
        )  # fmt: skip
    return o if sums is None else (o, sums)


def descriptor(x: Tensor, rows: int, columns: int) -> tuple[TensorDescriptor, int]:
    """x: [T, H, D] as a matrix that TMA copies boxes of `rows` by `columns` from, and how many columns a head is apart."""
    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    steps = [step * x.element_size() % ALIGN for step in x.stride()[:2]]
    if x.stride(2) != 1 or x.stride(0) < width or any(steps) or x.data_ptr() % ALIGN:
        x = x.clone(memory_format=torch.contiguous_format)
        width = x.shape[1] * x.shape[2]
    flat = x.as_strided((x.shape[0], width), (x.stride(0), 1))
    return TensorDescriptor.from_tensor(flat, [rows, columns], LAYOUT), x.stride(1)


def hopper_spec(name: str, spec: AttnSpec) -> AotSpec:
    boxes = {"q_desc": (M // GROUPS.value, BOXES), "k_desc": (KEYS, BOXES), "v_desc": (KEYS, spec.v_head_dim)}
    return AotSpec(
        op="attn.ragged",
        name=f"hopper, {name}",
        kernel=_attend_hopper,
        signature={
            **{key: f"tensordesc<bf16[{rows},{columns}],{LAYOUT!r}>" for key, (rows, columns) in boxes.items()},
            **dict.fromkeys(("q_head", "k_head", "v_head", "num_reqs", "num_tiles"), "i32"),
            **dict.fromkeys(("cu_q", "cu_k"), "*i32"),
            "o": "*bf16",
            "lse": "*fp32",
            "scale": "fp32",
        },
        constexprs={
            "NUM_HEADS": spec.num_heads,
            "GROUP": spec.num_heads // spec.num_kv_heads,
            "W": spec.head_dim,
            "WV": spec.v_head_dim,
            "N": KEYS,
            "STAGES": STAGES,
            "CAUSAL": spec.causal,
            "LSE": True,
        },
        fixed={"num_warps": WARPS},
        odd=("num_reqs", "num_tiles"),
        instructions={"sm_90": ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg", "mbarrier.try_wait")},
        archs=("sm_90",),
    )


AOT = (
    hopper_spec("causal, D=128", spec_of(32, 8, 128)),
    hopper_spec("D=64", spec_of(16, 16, 64, causal=False)),
    hopper_spec("D=192 to 128, causal", spec_of(16, 16, 192, v_head_dim=128)),
)
