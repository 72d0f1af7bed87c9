"""Sets of tensors that lie in the same memory, one set at a time."""

from __future__ import annotations

import torch

from sglang_core.backend.shared_memory import ALIGN, SharedMemory


def place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def test_a_set_has_the_shapes_of_what_it_is_like_and_no_two_of_it_overlap() -> None:
    given = [
        torch.arange(6.0).view(2, 3),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int32).mT,
        torch.tensor([True, False, True]),
        torch.empty(0, 4),
        torch.tensor(5, dtype=torch.int64),
        torch.zeros(1).expand(3),
        torch.arange(3, dtype=torch.int32),
    ]
    made = SharedMemory().like(given)
    for own, x in zip(made, given, strict=True):
        own.copy_(x)
    for own, x in zip(made, given, strict=True):
        assert torch.equal(own, x) and own.dtype == x.dtype and own.stride() == x.clone().stride()
    assert len({place(own) for own in made if own.numel()}) == len({x.dtype for x in given})
    assert all(own.storage_offset() * own.element_size() % ALIGN == 0 for own in made)


def test_sets_lie_in_the_memory_of_the_largest() -> None:
    memory = SharedMemory()
    large, small = memory.like([torch.zeros(100), torch.zeros(7)]), memory.like([torch.zeros(100)])
    assert place(small[0]) == place(large[0])
    large[0].fill_(3)
    assert small[0].eq(3).all()


def test_what_was_given_stays_when_a_larger_set_comes() -> None:
    memory = SharedMemory()
    (first,) = memory.like([torch.zeros(4)])
    first.fill_(1)
    (second,) = memory.like([torch.zeros(400)])
    second.fill_(2)
    assert first.eq(1).all() and place(first) != place(second)
    assert place(memory.like([torch.zeros(4)])[0]) == place(second)
