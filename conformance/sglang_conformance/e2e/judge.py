"""The verdict on a case of the engine: as that on an op, but that kernels of many ops run, and the engine is one of several."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sglang_conformance.case import Outputs, dtype_name
from sglang_conformance.e2e.case import EngineCase
from sglang_conformance.e2e.env import EngineEnv, bodies
from sglang_conformance.result import Result, Verdict
from sglang_conformance.tolerance import Error, compare_rows
from sglang_core.backend.claims import Support
from sglang_core.backend.selection import DECOMPOSED, REFERENCE
from sglang_core.errors import KernelSelectionError

if TYPE_CHECKING:
    from sglang_conformance.runner import Suite


def judge(suite: Suite, case: EngineCase, dtype: torch.dtype) -> Result:
    """Run the case on the suite's device and, where it returns log-probabilities, on the op bodies; compare."""
    result = Result(
        op=case.op,
        title=case.title(dtype),
        dtype=dtype_name(dtype),
        profile=case.profile,
        fmt=case.fmt,
        verdict=Verdict.FAIL,
    )
    declared = (suite.claims.support(op, dtype=dtype_name(dtype)) for op in (case.op, *case.covers))
    if Support.UNSUPPORTED in declared:
        return replace(result, verdict=Verdict.NOT_CLAIMED, reason="declared unsupported; not run")
    env = suite.engines.get(case.model, dtype)
    try:
        outputs = case.run(env)
    except KernelSelectionError as e:
        stated = all(option in ("core", *suite.claims.profiles) for option in (case.profile, *case.needs))
        return replace(result, verdict=Verdict.FAIL if stated else Verdict.NOT_CLAIMED, reason=str(e))
    except pytest.skip.Exception as e:
        return replace(result, reason=f"skips itself, which counts as failing: {e}", **_ran(env))
    except AssertionError as e:  # a relation that a case checks
        return replace(result, reason=str(e) or "an assertion fails", **_ran(env))
    except (Exception, SystemExit) as e:  # a kernel may raise anything
        return replace(result, reason=f"{type(e).__name__}: {e}", **_ran(env))
    errors, wrong = _compare(case, dtype, suite.seed, outputs, env)
    result = replace(result, errors=errors, reason="; ".join(wrong), **_ran(env))
    if wrong:
        return result
    if result.provider == REFERENCE:
        return replace(result, verdict=Verdict.REFERENCE)
    return replace(result, verdict=Verdict.EMULATED if suite.info.facts.get("emulated") else Verdict.PASS)


def _ran(env: EngineEnv) -> dict[str, Any]:
    """What `explain` says of the model: who provides its kernels, and how many ops have one."""
    rows = env.explained
    providers = sorted({row.provider for row in rows} - {REFERENCE, DECOMPOSED})
    native = sum(bool(row.kernels) for row in rows)
    return {
        "provider": ", ".join(providers) or REFERENCE,
        "why": f"{native} of {len(rows)} op sites run kernels" if rows else "",
        "kernels": tuple(dict.fromkeys(kernel for row in rows for kernel in row.kernels)),
    }


def _compare(
    case: EngineCase, dtype: torch.dtype, seed: int, outputs: Outputs, env: EngineEnv
) -> tuple[dict[str, Error], list[str]]:
    """The error of each output against the op bodies, and what is wrong with those that are."""
    if not outputs:
        return {}, []
    unit = env.engine().unit
    oracle = _on_bodies(case, dtype, seed, unit, oracle=True)
    ours = oracle if dtype == torch.float32 else _on_bodies(case, dtype, seed, unit, oracle=False)
    found = {
        name: compare_rows(name, x, ours[name], oracle[name], dtype, routed=case.model.routed)
        for name, x in outputs.items()
    }
    return {name: err for name, (err, _) in found.items()}, [why for _, why in found.values() if why is not None]


def _on_bodies(case: EngineCase, dtype: torch.dtype, seed: int, unit: int, *, oracle: bool) -> Outputs:
    env = bodies(case.model, dtype, seed, oracle=oracle, unit=unit)
    try:
        return case.run(env)
    finally:
        env.close()
