"""Memory that asks for huge pages: the kernel says of each mapping what it was advised to do."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from sglang_xeon import gemm, huge_pages
from torch import Tensor

from sglang_core.api.ops import PackedWeight

MIB = 2**20
pytestmark = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no transparent huge pages"
)


def is_advised(x: Tensor) -> bool:
    """Whether the mapping that holds the middle of x has the flag "hg"."""
    middle, inside = x.data_ptr() + x.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= middle < int(match[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds x")


def test_memory_of_its_own() -> None:
    x = huge_pages.empty(5 * MIB + 3)
    assert (x.dtype, x.shape) == (torch.uint8, (5 * MIB + 3,)) and is_advised(x)
    x.fill_(7)
    assert int(x.sum(dtype=torch.int64)) == 7 * x.numel()


def test_little_memory_is_torchs() -> None:
    assert huge_pages.empty(1000).shape == (1000,) and not is_advised(huge_pages.empty(1000))


def test_advice_on_what_is_there() -> None:
    x = torch.empty(64 * MIB, dtype=torch.uint8)
    assert not is_advised(x)
    huge_pages.advise(x)
    assert is_advised(x)
    huge_pages.advise(torch.empty(3))  # too little: nothing happens


def test_packed_weights_lie_there() -> None:
    weight = torch.randn(1024, 2048).bfloat16()
    packed = gemm.pack(PackedWeight("dense", {"weight": weight}, out_features=1024, in_features=2048))
    assert is_advised(packed["packed"])
    view = packed["packed"][10:]
    del packed
    gc.collect()
    assert torch.isfinite(view.float()).all(), "a view keeps the memory"
