"""Experts by DeepGEMM, which is not installed here: the one function that is called, with the checks of its release 1.0.0, stands for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from sglang_cuda.backend import CudaBackend
from sglang_triton.gpu import optional
from torch import Tensor

from sglang_core.api import DeviceInfo, OpSite
from sglang_core.api.ops import OPS, ExpertSpec
from sglang_core.backend.selection import BoundOp, OpTable

FUSED = "sglang_cuda.deep_gemm_experts:fused"
HIDDEN, WIDTH, EXPERTS = 128, 128, 3
ALIGNMENT = 128


def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    lhs: tuple[Tensor, Tensor], rhs: tuple[Tensor, Tensor], out: Tensor, m_indices: Tensor
) -> None:
    """Rows of lhs meet the matrix of rhs that m_indices says, one for each ALIGNMENT rows."""
    (a, a_scale), (b, b_scale) = lhs, rhs
    (m, k), (num_groups, n, _) = a.shape, b.shape
    assert b.shape[2] == k and out.shape == (m, n) and m_indices.numel() == m
    assert a_scale.shape == (m, -(-k // 128)) and b_scale.shape == (num_groups, -(-n // 128), -(-k // 128))
    assert (a.dtype, b.dtype, out.dtype) == (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16)
    assert a_scale.dtype == b_scale.dtype == torch.float32 and m_indices.dtype == torch.int32
    assert all(x.is_contiguous() for x in (a, b, b_scale, out, m_indices))
    assert m % ALIGNMENT == 0 and bool((m_indices >= 0).all())  # some builds read scales at -1
    blocks = m_indices.view(-1, ALIGNMENT)
    assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))
    wide_a = a.float() * a_scale.repeat_interleave(128, dim=1)
    wide_b = b.float() * b_scale.repeat_interleave(128, dim=1)[:, :n].repeat_interleave(128, dim=2)
    for i, group in enumerate(blocks[:, 0].tolist()):
        rows = slice(i * ALIGNMENT, (i + 1) * ALIGNMENT)
        out[rows] = wide_a[rows] @ wide_b[group].T


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("deep_gemm")
    module.m_grouped_gemm_fp8_fp8_bf16_nt_contiguous = m_grouped_gemm_fp8_fp8_bf16_nt_contiguous  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    monkeypatch.delitem(sys.modules, "sglang_cuda.deep_gemm_experts", raising=False)
    monkeypatch.setattr(optional, "version", lambda name: "1.0.0")
    yield
    sys.modules.pop("sglang_cuda.deep_gemm_experts", None)


def bound(*, arch: int = 90, dims: dict[str, int] | None = None, **facts: Any) -> BoundOp:
    info = DeviceInfo(backend="cuda", path=f"cuda/sm_{arch}", name="test")
    sizes = {"X": EXPERTS, "K": 2, "M": HIDDEN, "F": WIDTH} | (dims or {})
    site = {"dtype": "bfloat16", "fmt": "fp8.block128", "spec": ExpertSpec(), "dims": sizes} | facts
    return OpTable(info, CudaBackend(), ops=OPS, page_size=16).bind(OpSite(op="moe.fused", layer="Experts", **site))


def many(op: BoundOp) -> Any:
    """The variant for many tokens, of which the interpreter would take minutes."""
    assert op.provider == "deep_gemm" and [kernel.fn for kernel in op.kernels][1:] == [FUSED]
    from sglang_cuda import deep_gemm_experts

    return deep_gemm_experts.fused


def given(tokens: int, num_ids: int = EXPERTS) -> list[Any]:
    torch.manual_seed(0)
    shapes = (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)
    w13, w2 = (OPS["quant.quantize"].body(torch.randn(EXPERTS, *shape) * 0.1, "fp8.block128") for shape in shapes)
    ids = torch.stack([torch.randperm(num_ids)[:2] for _ in range(tokens)]).int() if tokens else torch.zeros(0, 2).int()
    return [torch.randn(tokens, HIDDEN).bfloat16(), w13, w2, torch.rand(tokens, 2), ids]


def check(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2**-5, atol=0.05)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("tokens", [1, 7, 200])
@pytest.mark.parametrize("act", [ExpertSpec(), ExpertSpec(activation="gelu_tanh", weight_on_input=True)], ids=str)
def test_it_is_the_op(tokens: int, act: ExpertSpec) -> None:
    """Of 200 tokens an expert has more than a block and less than two."""
    fused, args = many(bound(spec=act)), [*given(tokens), act]
    check(fused(*args), OPS["moe.fused"].body(*args))


@pytest.mark.usefixtures("installed")
def test_biases_are_added_and_an_expert_may_have_no_token() -> None:
    fused, args = many(bound()), [*given(9), ExpertSpec()]
    args[4] = args[4].clamp(max=1)
    more = {
        "bias13": (0.2 * torch.randn(EXPERTS, 2 * WIDTH)).bfloat16(),
        "bias2": (0.2 * torch.randn(EXPERTS, HIDDEN)).bfloat16(),
    }
    check(fused(*args, **more), OPS["moe.fused"].body(*args, **more))


@pytest.mark.usefixtures("installed")
def test_where_ranks_hold_experts_whole_triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token's experts are all remote."""
    fused, args = many(bound()), [*given(9, num_ids=5), ExpertSpec()]
    monkeypatch.delattr(sys.modules["deep_gemm"], "m_grouped_gemm_fp8_fp8_bf16_nt_contiguous")
    args[4][0] = torch.tensor([1, 3])
    more = {"expert_map": torch.tensor([2, -1, 0, -1, 2], dtype=torch.int32)}
    got = fused(*args, **more)
    assert not got[0].any()
    check(got, OPS["moe.fused"].body(*args, **more))


@pytest.mark.usefixtures("installed")
def test_no_tokens_and_one_expert_for_all_of_them() -> None:
    fused = many(bound())
    assert fused(*given(0), ExpertSpec()).shape == (0, HIDDEN)
    args = [*given(150), ExpertSpec()]
    args[4] = torch.full_like(args[4], 1)
    check(fused(*args), OPS["moe.fused"].body(*args))


@pytest.mark.usefixtures("installed")
def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes follow from shapes alone: a tensor that has no values will do. The sort is a kernel's launch."""
    from sglang_cuda.deep_gemm_experts import layout

    monkeypatch.setitem(layout.__globals__, "by_group", lambda group, num_groups: (group, group.new_empty(num_groups)))
    place, expert = layout(torch.empty(1000, dtype=torch.int32, device="meta"), EXPERTS)
    assert place.shape == (1000,) and expert.shape == ((1000 + EXPERTS * (ALIGNMENT - 1)) // ALIGNMENT * ALIGNMENT,)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"arch": 100}, "is for sm_90; this is sm_100"),
        ({"dims": {"F": 96}}, "experts of multiples of 128, not F=96"),
        ({"fmt": "int4.awq.g128"}, "takes weights in fp8.block128, not int4.awq.g128"),
        ({"dtype": "float16"}, "gives bfloat16, not float16"),
    ],
)
def test_what_it_is_not_for(facts: dict[str, Any], reason: str) -> None:
    op = bound(**facts)
    assert op.provider == "triton" and any(k.startswith("deep_gemm") and reason in why for k, why in op.refused)


@pytest.mark.usefixtures("installed")
def test_decode_steps_are_left_to_triton() -> None:
    few, _ = bound().kernels
    assert few.fn == "sglang_triton.moe:fused" and few.tokens == (1, 512)


def test_without_it_triton_runs_and_explain_says_how_to_get_it() -> None:
    op = bound()
    assert op.provider == "triton" and "sglang_cuda.deep_gemm_experts" not in sys.modules
    assert any("get deep-gemm>=1.0,<1.1 from https://github.com/deepseek-ai/DeepGEMM" in why for _, why in op.refused)
