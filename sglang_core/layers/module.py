"""`Module`: an `nn.Module` whose call is its forward. A step of a small model is a few hundred of them."""

from __future__ import annotations

from typing import Any

from torch import nn


class Module(nn.Module):
    """What models and layers are made of: `nn.Module` without its hooks.

    A call goes straight to `forward`, and a child is found like any attribute: torch's own `__call__` looks for hooks and for
    tracing first, and its `__getattr__` is asked once Python's own look-up has failed.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self._modules:  # torch keeps children there, and moves their tensors, not them
            self.__dict__[name] = self._modules[name]

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            self.__dict__.pop(name, None)
        super().__delattr__(name)
