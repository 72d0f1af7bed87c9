"""What a GPU can do without, for `sglang-core doctor`: our all-reduce, and packages that are used where they are installed. Imports none of them."""

from __future__ import annotations

from sglang_triton.gpu.optional import problem, provider_note

from sglang_core.api import DeviceNote
from sglang_cuda import deep_gemm, flash_attn, flashinfer, sgl_kernel
from sglang_cuda.build_all_reduce import HOW, LIBRARY

PROVIDERS = {
    "flashinfer": (flashinfer.PACKAGE, flashinfer.RELEASES),
    "sgl_kernel": (sgl_kernel.PACKAGE, sgl_kernel.RELEASES),
    "flash_attn": (flash_attn.PACKAGE, flash_attn.RELEASES),
    "deep_gemm": (deep_gemm.PACKAGE, deep_gemm.RELEASES, deep_gemm.SOURCE),
}


def notes(num_gpus: int) -> tuple[DeviceNote, ...]:
    """`num_gpus`: that are visible."""
    return (all_reduce_note(num_gpus), *(provider_note(name, problem(*package)) for name, package in PROVIDERS.items()))


def all_reduce_note(num_gpus: int) -> DeviceNote:
    """Without it ranks sum by NCCL, which is right, and slower for short sums."""
    if LIBRARY.exists():
        return DeviceNote(
            name="all-reduce", found="built: short sums between GPUs go through it where they reach each other's memory"
        )
    if num_gpus < 2:
        return DeviceNote(name="all-reduce", found="not built, and of no use to a single GPU")
    return DeviceNote(name="all-reduce", found="not built: sums between GPUs go through NCCL", fix=HOW)
