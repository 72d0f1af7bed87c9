"""Kernels that do not give a wrong number, but do worse: they end their process, never return, or excuse themselves."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from torch import Tensor

from sglang_core.ops import OPS


def crashes_on_bias(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if bias is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(x, weight, bias, eps)


def hangs_on_bias(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if bias is not None:
        time.sleep(600)
    return honest(x, weight, bias, eps)


def exits(*args: Any) -> Tensor:
    raise SystemExit(0)


def skips(*args: Any) -> Tensor:
    pytest.skip("not today")


def honest(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return OPS["norm.layer"].body(x, weight, bias, eps)  # type: ignore[no-any-return]


def wrong(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return honest(x, weight, bias, eps) * 1.5


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return OPS["norm.rms"].body(x, weight, eps)  # type: ignore[no-any-return]
