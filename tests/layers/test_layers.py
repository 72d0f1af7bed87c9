from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.selection import OpTable
from sglang_core.layers.build import bind_model
from sglang_core.layers.forward_batch import ForwardBatch
from sglang_core.layers.linear import ColumnLinear, Linear, RowLinear
from sglang_core.layers.norm import LayerNorm, RMSNorm
from sglang_core.models.registry import create_model
from sglang_core.ops import OPS
from sglang_core.weights.loader import load_model
from tests.layers import transposed
from tests.models.harness import Row, Stepper, build_context
from tests.weights.test_loader import CONFIG, TOKENS, Ranked, logits

GEMMA = CONFIG | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 8,
}


def dummy(config: dict[str, Any], **context: Any) -> Any:
    return load_model(create_model(config), "", build_context(**context), load_format="dummy")


def faked(value: Any, mode: FakeTensorMode) -> Any:
    """A dataclass, mapping or tuple with every tensor in it replaced by a fake one."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value)
    if isinstance(value, dict):
        return {k: faked(v, mode) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(faked(v, mode) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: faked(getattr(value, f.name), mode) for f in dataclasses.fields(value) if f.init}
        return replace(value, **changes)
    return value


def fake_step(model: Any) -> Tensor:
    """One step whose tensors have shapes and no values: whatever looks at a value raises."""
    stepper = Stepper(model)
    fb: ForwardBatch = stepper.batch([(Row(), TOKENS), (Row(), TOKENS[:1])])
    mode = FakeTensorMode()
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    for pool in stepper.pools.values():
        pool.leaves = [mode.from_tensor(leaf) for leaf in pool.leaves]
    fb = replace(faked(replace(fb, pools={}), mode), pools=stepper.pools)
    with mode, torch.no_grad():
        result: Tensor = model.head(model(fb)[fb.sample_rows])
    return result


@pytest.mark.parametrize("config", [CONFIG, GEMMA], ids=["llama", "gemma3"])
def test_a_step_never_looks_at_a_value(config: dict[str, Any]) -> None:
    assert fake_step(dummy(config)).shape == (len(TOKENS) + 1, 37)


def test_a_step_that_looks_at_a_value_is_caught() -> None:
    model = dummy(CONFIG)
    inner = model.model.norm.forward
    model.model.norm.forward = lambda h, residual: inner(h * h.sum().item(), residual)
    with pytest.raises(DataDependentOutputException):
        fake_step(model)


def test_a_kernel_packs_each_weight_as_soon_as_its_parts_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, here = CpuBackend(), "tests.layers.transposed"
    kernel = Kernel("gemm.linear", provider="vendor", fn=f"{here}:linear", pack=f"{here}:pack", device=("cpu",))
    table = OpTable(backend.probe()[0], backend, ops=OPS, kernels=[kernel])
    transposed.packed.clear()
    held: list[int] = []
    monkeypatch.setattr(Linear, "load", _counting(Linear.load, held))
    model = load_model(create_model(CONFIG), "", replace(build_context(), table=table), load_format="dummy")
    assert len(transposed.packed) == 4 * 2 + 1  # qkv, o, gate_up, down in two layers, and the head
    assert (16 + 2 * 16 * 2 // 2 + 16, 32) in transposed.packed
    assert held == [1, 2, 3, 4, 5, 6, 7, 8]  # each was packed before the next arrived
    assert float((logits(model) - logits(dummy(CONFIG))).abs().max()) < 1e-5


def _counting(load: Any, held: list[int]) -> Any:
    def wrapped(self: Linear, parts: list[Tensor]) -> None:
        load(self, parts)
        held.append(len(transposed.packed))

    return wrapped


def test_layers_of_one_rope_share_its_table() -> None:
    llama, gemma = dummy(CONFIG), dummy(GEMMA)
    tables = lambda model: {layer.self_attn.rotary_emb.table.data_ptr() for layer in model.model.layers}  # noqa: E731
    assert (len(tables(llama)), len(tables(gemma))) == (1, 2)


def test_what_a_model_tells_the_runner() -> None:
    model = create_model(GEMMA)
    bind_model(model, build_context(tp=Ranked(0, 2)))
    assert [(s.window, s.num_heads, s.num_kv_heads) for s in model.attn_specs] == [(5, 2, 1), (None, 2, 1)]
    assert list(model.attn_plans) == list(model.attn_specs)
    specs = model.pool_specs(16, torch.bfloat16)
    assert list(specs) == list(model.pool_groups.values()) == ["window-5", "full"]
    assert [(s.num_layers, s.num_kv_heads, s.head_dim, s.page_size) for s in specs.values()] == [(1, 1, 8, 16)] * 2
    assert [s.group_spec.window for s in specs.values()] == [5, None]


def test_embeddings_may_stand_for_ids() -> None:
    model = dummy(GEMMA)
    stepper = Stepper(model)
    fb = stepper.batch([(Row(), TOKENS)])
    embeds = model.model.embed_tokens(fb)
    assert abs(float(embeds.std()) - 1.0) < 0.1  # scaled by sqrt(M)
    given = replace(fb, token_ids=torch.zeros_like(fb.token_ids), input_embeds=embeds)
    assert torch.equal(model(given), model(fb))


def test_a_model_in_bfloat16_keeps_its_offset_norms_in_float32() -> None:
    model = dummy(GEMMA, dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.down_proj.weight["weight"].dtype == torch.bfloat16
    assert float((logits(model) - logits(dummy(GEMMA))).abs().max()) < 0.2


def test_layer_norm_is_torchs() -> None:
    for bias in (True, False):
        layer, x = LayerNorm(24, 1e-3, bias=bias), torch.randn(5, 24)
        layer.bind(build_context())
        parts = [torch.rand(spec.shape) for spec in layer.weights("n")]
        layer.load(parts)
        theirs = nn.functional.layer_norm(x, (24,), parts[0], parts[1] if bias else None, 1e-3)
        assert torch.allclose(layer(x), theirs, atol=1e-6)


def test_rms_norm_adds_then_normalises() -> None:
    layer, x, residual = RMSNorm(24, 1e-3), torch.randn(5, 24), torch.randn(5, 24)
    layer.bind(build_context())
    layer.load([torch.rand(24)])
    y, total = layer(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.allclose(y, nn.functional.rms_norm(total, (24,), layer.weight, 1e-3), atol=1e-6)
    assert torch.equal(layer(x, None)[1], x)


def test_column_and_row_parallel_ranks_sum_to_the_whole() -> None:
    x, up, down, bias = torch.randn(3, 8), torch.randn(12, 8), torch.randn(8, 12), torch.randn(8)
    total = torch.zeros(3, 8)
    for rank in range(3):
        ctx = build_context(tp=Ranked(rank, 3))
        column, row = ColumnLinear(8, 12), RowLinear(12, 8, bias=True)
        for layer, tensors in ((column, [up]), (row, [down, bias])):
            layer.bind(ctx)
            specs = layer.weights("layer")
            parts = [
                t if s.ranges is None else t[(slice(None),) * s.dim + (slice(*s.ranges[0]),)]
                for t, s in zip(tensors, specs)
            ]
            layer.load([layer.place(i, part) for i, part in enumerate(parts)])
        total += row(column(x))
    assert torch.allclose(total, nn.functional.linear(x @ up.T, down, bias), atol=1e-4)
