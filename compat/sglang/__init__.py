"""The import name `sglang` for sglang-core. Everything here is sglang-core's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sglang_core
from sglang_core import __version__

if TYPE_CHECKING:
    from sglang_core import Engine

__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    """What sglang-core exports now or later, looked up on first use so that `import sglang` stays light."""
    if name in sglang_core.__all__:
        return getattr(sglang_core, name)
    raise AttributeError(
        f"sglang.{name} does not exist here: this `sglang` is sglang-compat, and sglang-core {__version__} offers "
        f"{', '.join(sorted(sglang_core.__all__))}"
    )


def __dir__() -> list[str]:
    return sorted({*__all__, *sglang_core.__all__})
