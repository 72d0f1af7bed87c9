"""`Case`: one thing that an op must get right, and the list of all of them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]
Profile = Literal[
    "core",
    "window",
    "soft_cap",
    "sinks",
    "tree",
    "cross",
    "kv_half",
    "kv_fp8",
    "kv_int8",
    "odd_sizes",
    "buckets",
    "mesh",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)  # where 2^31 elements fit a small machine


@dataclass(frozen=True, kw_only=True)
class Case:
    """`run` makes inputs from the env, calls ops of the env, and returns what is compared.

    Outputs named in `exact` must equal the body's bit for bit. Integer outputs may differ in `mismatch` of their elements.
    """

    op: str
    name: str
    run: Callable[[Any], Outputs]  # of an Env; of an EngineEnv where it is an EngineCase
    dtypes: tuple[torch.dtype, ...] = FLOATS
    profile: Profile = "core"
    fmt: str = "*"
    exact: tuple[str, ...] = ()
    mismatch: float = 0.0
    covers: tuple[str, ...] = ()  # ops that it exercises beside `op`
    full: bool = False  # takes long: part of `--full` only

    def title(self, dtype: torch.dtype) -> str:
        return f"{self.op}[{self.name}-{dtype_name(dtype)}]"


CASES: list[Case] = []


def add(case: Case) -> None:
    assert all((case.op, case.name) != (c.op, c.name) for c in CASES), f"two cases of {case.op} are named {case.name!r}"
    CASES.append(case)


def all_cases() -> list[Case]:
    """Every case, by op family."""
    from sglang_conformance import cases

    for module in pkgutil.iter_modules(cases.__path__, f"{cases.__name__}."):
        importlib.import_module(module.name)
    return CASES


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")
