"""SGLang as a plugin framework: a serving engine whose core knows no hardware.

>>> from sglang_core import Engine
>>> with Engine(model_path="demo") as engine:
...     engine.generate("The capital of France is", {"temperature": 0})["text"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]

if TYPE_CHECKING:
    from sglang_core.engine.engine import Engine


def __getattr__(name: str) -> Any:
    if name == "Engine":  # importing the package alone stays free of torch
        from sglang_core.engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
