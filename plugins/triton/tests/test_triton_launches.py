"""How many kernels a device would be asked to run for a layer of a decode step: each costs its launch, whatever it computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from sglang_core import Engine
from sglang_core.layers.gated_delta_net import GatedDeltaNet

CONFIG = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_size": 64,
    "intermediate_size": 48,
    "mlp_only_layers": [0, 1],
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided")


class Launches(TorchDispatchMode):
    """Names what a device would run: PyTorch's operators but views and allocations, and Triton's kernels as one each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name, given = func._schema.name.removeprefix("aten::"), _storages((args, kwargs))
        if name not in ALLOCATIONS and (func._schema.is_mutable or not _storages(made) <= given):
            self.names.append(name)
        return made

    @contextmanager
    def watching(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        run = GridExecutor.__call__

        def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.names.append(f"triton {executor.fn.__name__}")
            with _disable_current_modes():
                return run(executor, *args, **kwargs)

        with patch.context() as inside, self:
            inside.setattr(GridExecutor, "__call__", launched)
            yield


def _storages(tree: Any) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


def test_of_a_gated_delta_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products in, convolution, gates, rule, norm with its gate, product out."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    forward, decodes = GatedDeltaNet.forward, []

    def watched(net: GatedDeltaNet, h: torch.Tensor, fb: Any) -> torch.Tensor:
        launches = Launches()
        with launches.watching(monkeypatch):
            y = forward(net, h, fb)
        if fb.plans[net.spec].static.max_extend == 1:
            decodes.append((h.shape[0], launches.names))
        return y

    monkeypatch.setattr(GatedDeltaNet, "forward", watched)
    common = {"device": "triton", "dtype": "bfloat16", "in_process": True, "load_format": "dummy"}
    sizes = {"max_total_tokens": 256, "max_running_requests": 4, "page_size": 16}
    with Engine(model_path=str(tmp_path), skip_tokenizer_init=True, **common, **sizes) as engine:
        sampling = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
        engine.generate(input_ids=[[1, 2, 3], [4, 5]], sampling_params=sampling)
    assert 2 in {tokens for tokens, _ in decodes}
    for _, names in decodes:
        assert len(names) == 7, names
