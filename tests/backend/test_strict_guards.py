"""Memory between guards is as large as what it stands for, however often it is moved."""

from __future__ import annotations

import torch

from sglang_core.backend.strict_memory import guarded, guards_hold


def test_memory_that_is_guarded_again_does_not_grow() -> None:
    first = guarded(torch.zeros(3, 5).t())
    again = guarded(guarded(first))
    assert again.untyped_storage().nbytes() == first.untyped_storage().nbytes()
    assert (again.shape, again.stride()) == ((5, 3), (1, 5))
    assert guards_hold(again.zero_())
    assert guarded(torch.zeros(0, 4)).shape == (0, 4)
