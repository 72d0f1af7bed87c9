"""Triton's kernels run through its interpreter here: set before triton is first imported, which is when it is read."""

import os
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import sglang_rocm

os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def aiter(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """As if it were installed."""
    from aiter_fake import flash_attn_varlen_func
    from sglang_triton.gpu import optional

    module = ModuleType("aiter")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aiter", module)
    monkeypatch.setattr(optional, "version", lambda name: "0.1.22+rocm7.2.manylinux.2.28")
    forget()
    yield module
    forget()


def forget() -> None:
    """The modules that import it, which would keep what they found."""
    for name in ("aiter_attention", "aiter_paged"):
        sys.modules.pop(f"sglang_rocm.{name}", None)
        vars(sglang_rocm).pop(name, None)
