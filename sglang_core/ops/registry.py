"""`@op`: an op is a function whose body is its definition. The registry maps its name to the body and its facts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

STRICT_FAMILIES = ("attn", "gemm", "moe")  # a fallback here costs most: an error unless a flag allows it


@dataclass(frozen=True, kw_only=True, slots=True)
class OpDef:
    """One op. A composite's body calls other ops, so not having a kernel for it is no fallback.

    `parts` maps keyword-only parameters of a composite's body to the ops that stand there; each defaults to that op's own
    body. A kernel of the composite has no such parameters.
    """

    name: str
    body: Callable[..., Any]
    composite: bool = False
    weighted: bool = False  # takes a PackedWeight, so selection asks about its format
    host: bool = False  # runs on the host, before the step: a plan
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def strict(self) -> bool:
        """Whether a fallback of this op is an error by default. A composite's is not: its parts are asked themselves."""
        return self.family in STRICT_FAMILIES and not self.composite

    def decompose(self, bind: Callable[[str], Callable[..., Any]]) -> Callable[..., Any]:
        """The body with what `bind` gives for each op it is made of, so that a kernel for a part is never lost."""
        return functools.partial(self.body, **{param: bind(part) for param, part in self.parts.items()})


OPS: dict[str, OpDef] = {}


def op(
    name: str, *, composite: bool | Mapping[str, str] = False, weighted: bool = False, host: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as the definition of op `name`. Two definitions of one name are a bug.

    `composite={"rms": "norm.rms"}` says that the body has a keyword-only parameter `rms`, by default the body of norm.rms.
    """
    parts = dict(composite) if isinstance(composite, Mapping) else {}

    def register(body: Callable[P, R]) -> Callable[P, R]:
        assert name not in OPS, f"op {name!r} is defined twice"
        for param, part in parts.items():
            assert part in OPS, f"op {name!r} is made of {part!r}, which is not defined before it"
            given = inspect.signature(body).parameters.get(param)
            assert given is not None and given.kind is given.KEYWORD_ONLY and given.default is OPS[part].body, (
                f"op {name!r} needs a keyword-only parameter {param!r} that defaults to the body of {part!r}"
            )
        OPS[name] = OpDef(name=name, body=body, composite=bool(composite), weighted=weighted, host=host, parts=parts)
        return body

    return register
