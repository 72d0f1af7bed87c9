"""Windows under a tree mask, which count by depth: host work."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sglang_core.api.ops import AttnBatch, within_window


def tree_windows(window: int | None, batch: AttnBatch) -> tuple[Tensor | None, Tensor | None]:
    """-> the tree mask without own tokens out of each one's window, int32[T, W], and each token's first key, int32[T].

    A token at depth d sees depths in (d - window, d] of its own path, and those keys of the prefix that are near enough.
    (None, None) where there is no tree, and no first keys where there is no window.
    """
    if batch.tree_mask_cpu is None:
        return None, None
    if window is None:
        return batch.tree_mask_cpu.contiguous(), None
    cu = batch.cu_extend_cpu.numpy()
    words, depth, first_bit = within_window(batch.tree_mask_cpu.numpy(), window, cu)
    prefix = np.zeros(len(words), np.int32)
    prefix[: cu[-1]] = np.repeat(batch.prefix_lens_cpu.numpy(), np.diff(cu))
    first = prefix + depth - (window - 1)
    first = np.maximum(np.where(first < prefix, first, prefix + first_bit), 0)
    return torch.from_numpy(words), torch.from_numpy(first)
