"""`EngineCase`: one thing that an engine of a device must get right with one model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from sglang_conformance.case import Case, Outputs, Profile, add
from sglang_conformance.e2e.checkpoint import TinyModel
from sglang_conformance.e2e.env import EngineEnv

ENGINE = "e2e."  # what their ops begin with
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class EngineCase(Case):
    """`run` is given an EngineEnv. It returns log-probabilities for the oracle to judge, or nothing where its assertions are all.

    Without the options in `needs`, a backend may refuse it.
    """

    model: TinyModel
    needs: tuple[Profile, ...] = ()


def add_engine_case(
    model: TinyModel, name: str, run: Callable[[EngineEnv], Outputs], dtypes: tuple[torch.dtype, ...] = DTYPES
) -> None:
    add(
        EngineCase(
            op=f"{ENGINE}{model.name}",
            name=name,
            run=run,
            dtypes=dtypes,
            profile=model.needs[0] if model.needs else "core",
            needs=model.needs,
            covers=model.covers,
            full=model.full,
            model=model,
        )
    )


def level_of_case(case: Case) -> Literal["ops", "e2e"]:
    return "e2e" if isinstance(case, EngineCase) else "ops"
