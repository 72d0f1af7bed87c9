"""A kernel that is right passes, one that is wrong is counted and named, and the step's own result is the kernel's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_core.backend.kernel import OpSite
from sglang_core.backend.selection import BoundOp
from sglang_core.ops import OPS
from sglang_core.runner.verify import KernelVerifier, distance


def bound(fn: Callable[..., object], provider: str = "acme") -> BoundOp:
    site = OpSite(op="norm.rms", layer="RMSNorm", dtype="float32")
    return BoundOp(site=site, fn=fn, provider=provider, reason="test")


def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return OPS["norm.rms"].body(x, weight, eps) * 1.01


X, W = torch.randn(4, 8), torch.randn(8)


def test_a_wrong_kernel_is_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    verifier = KernelVerifier(1.0, OPS, active=True)
    fn = verifier.instrument(bound(wrong)).fn
    with caplog.at_level(logging.WARNING):
        got = fn(X, W, 1e-6)
    assert torch.equal(got, wrong(X, W, 1e-6)), "the step goes on with what the kernel gave"
    assert verifier.stats()["verify_failures"] == 1
    assert verifier.stats()["verify_worst_nmse"] == pytest.approx(1e-4, rel=0.05)
    assert "norm.rms in RMSNorm by acme is off" in caplog.text


def test_the_report_names_every_op_worst_first() -> None:
    verifier = KernelVerifier(1.0, OPS, active=True, num_steps=7)
    verifier.instrument(bound(OPS["norm.rms"].body, "good")).fn(X, W, 1e-6)
    verifier.instrument(bound(wrong)).fn(X, W, 1e-6)
    title, first, second = verifier.report().splitlines()
    assert title.startswith("7 steps")
    assert "norm.rms RMSNorm acme" in first and "1 of 1 calls off, worst NMSE 1.0e-04" in first
    assert "norm.rms RMSNorm good" in second and "1 calls right" in second


def test_a_right_kernel_passes_and_a_nan_does_not() -> None:
    verifier = KernelVerifier(1.0, OPS, active=True)
    verifier.instrument(bound(OPS["norm.rms"].body)).fn(X, W, 1e-6)
    assert verifier.stats()["verify_failures"] == 0
    verifier.instrument(bound(lambda *a: OPS["norm.rms"].body(*a) * float("nan"))).fn(X, W, 1e-6)
    assert verifier.stats()["verify_failures"] == 1


def test_nothing_is_compared_while_inactive_and_reference_ops_are_left_alone() -> None:
    verifier = KernelVerifier(1.0, OPS)
    verifier.instrument(bound(wrong)).fn(X, W, 1e-6)
    assert not any(error.calls for error in verifier.errors.values())
    reference = bound(OPS["norm.rms"].body, "reference")
    assert verifier.instrument(reference) is reference


def test_the_rate_is_the_share_of_steps() -> None:
    verifier = KernelVerifier(0.25, OPS, seed=1)
    chosen = [verifier.choose(step) for step in range(4000)]
    assert 0.2 < sum(chosen) / 4000 < 0.3
    assert chosen == [verifier.choose(step) for step in range(4000)]
    assert not any(KernelVerifier(0.0, OPS).choose(step) for step in range(100))


def test_codes_are_compared_as_the_numbers_that_they_stand_for() -> None:
    x, weight = torch.randn(16, 256).bfloat16(), torch.ones(256)
    site = OpSite(op="norm.add_rms_quant", layer="RMSNorm", dtype="bfloat16")

    def kernel(code: int, scale: float) -> Callable[..., object]:
        """One code of 4096 is another, and every scale is multiplied."""

        def fn(*args: Any) -> object:
            codes, total = OPS["norm.add_rms_quant"].body(*args)
            codes.code[3, 5] += code
            return codes._replace(scale=codes.scale * scale), total

        return fn

    for fn, failures in ((kernel(1, 1.0), 0), (kernel(0, 1.1), 1)):
        verifier = KernelVerifier(1.0, OPS, active=True)
        bound = BoundOp(site=site, fn=fn, provider="acme", reason="test")
        verifier.instrument(bound).fn(x, x, weight, 1e-6, "int8")
        assert verifier.stats()["verify_failures"] == failures


def test_distance_wants_infinities_in_the_same_places() -> None:
    inf = float("inf")
    assert distance(torch.tensor([1.0, -inf]), torch.tensor([1.0, -inf])) == (0.0, 0.0)
    assert distance(torch.tensor([1.0, 5.0]), torch.tensor([1.0, -inf]))[0] == inf
    assert distance(torch.zeros(0), torch.zeros(0)) == (0.0, 0.0)
