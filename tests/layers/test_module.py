from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sglang_core.layers.module import Module


class Scale(Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.register_buffer("by", torch.tensor([by]))

    def forward(self, x: Tensor, *, plus: float = 0.0) -> Tensor:
        return x * self.by + plus


class Pair(Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scale(2.0), Scale(3.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x, plus=1.0))
        return y


def test_it_is_a_torch_module_with_children_buffers_and_names() -> None:
    pair = Pair()
    assert isinstance(pair, nn.Module)
    assert [name for name, _ in pair.named_modules()] == ["", "first", "second"]
    assert sorted(pair.state_dict()) == ["first.by", "second.by"]
    assert pair(torch.ones(1)).tolist() == [9.0]


def test_a_child_that_is_replaced_moved_or_copied_is_the_one_that_runs() -> None:
    pair = Pair()
    pair.first = Scale(10.0)
    assert pair.first is pair._modules["first"]
    assert pair(torch.ones(1)).tolist() == [33.0]
    pair.double()
    assert pair(torch.ones(1, dtype=torch.float64)).dtype == torch.float64
    twin = copy.deepcopy(pair)
    twin.first.by.fill_(0.0)
    assert (twin(torch.ones(1)).tolist(), pair(torch.ones(1)).tolist()) == ([3.0], [33.0])


def test_a_child_is_found_without_asking_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, asked = Pair(), []
    before = nn.Module.__getattr__
    monkeypatch.setattr(nn.Module, "__getattr__", lambda self, name: asked.append(name) or before(self, name))
    pair(torch.ones(1))
    assert asked == ["by", "by"]  # buffers, which torch may replace behind our back


def test_a_child_that_is_deleted_is_gone() -> None:
    pair = Pair()
    del pair.first
    with pytest.raises(AttributeError, match="first"):
        pair.first  # noqa: B018
    with pytest.raises(AttributeError, match="never"):
        del pair.never
