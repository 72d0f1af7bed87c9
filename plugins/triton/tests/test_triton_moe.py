"""moe.route, moe.fused and gemm.grouped against their op bodies, through the interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from sglang_triton.gemm import INVARIANT_TOKENS
from sglang_triton.mla_project import mla_project_invariant
from sglang_triton.moe import INVARIANT_ROWS, fused, fused_invariant, grouped, grouped_invariant
from sglang_triton.moe_route import route
from sglang_triton.tuning import asking
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton_tolerance import assert_close

from sglang_core.api.ops import OPS, ExpertSpec, PackedWeight, RouteSpec

pytestmark = pytest.mark.usefixtures("tiles")
body = OPS["moe.route"].body
GROUPED = {"num_experts": 24, "num_groups": 4, "top_groups": 2}
SPECS = [
    RouteSpec(num_experts=8, top_k=2),
    RouteSpec(num_experts=60, top_k=4, renormalize=True),
    RouteSpec(num_experts=32, top_k=4, scoring="softmax_after_top_k", scale=2.0),
    RouteSpec(**GROUPED, top_k=6),
    RouteSpec(
        **GROUPED, top_k=5, scoring="sigmoid", group_score="top2_sum", has_bias=True, renormalize=True, scale=2.5
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_experts_and_weights(spec: RouteSpec, dtype: torch.dtype) -> None:
    """bfloat16 logits have equals among them, which rank by id."""
    torch.manual_seed(0)
    logits = torch.randn(37, spec.num_experts + 3).to(dtype)[:, 3:]
    bias = torch.randn(spec.num_experts) if spec.has_bias else None
    (weights, ids), (want, want_ids) = route(logits, spec, bias), body(logits, spec, bias)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=1e-6)


def test_equals_rank_by_id() -> None:
    spec = RouteSpec(num_experts=24, top_k=6, num_groups=4, top_groups=2, group_score="top2_sum")
    weights, ids = route(torch.zeros(3, 24), spec)
    assert ids.tolist() == [list(range(6))] * 3
    torch.testing.assert_close(weights, torch.full((3, 6), 1 / 24))


def test_no_tokens() -> None:
    weights, ids = route(torch.empty(0, 8), SPECS[0])
    assert weights.shape == ids.shape == (0, 2)


FMTS = ("dense", "fp8.block128", "fp8.token_channel", "int8.token_channel", "int4.gptq.g32", "mxfp4.g32")


def experts(fmt: str, num: int, rows: int, columns: int) -> PackedWeight:
    w = torch.randn(num, rows, columns) * columns**-0.5
    return OPS["quant.quantize"].body(w, fmt)


@pytest.mark.parametrize("fmt", FMTS)
def test_grouped(fmt: str) -> None:
    """A group of none, one of one row, one of more rows than a tile has, and rows of no group; a bias."""
    torch.manual_seed(0)
    w, sizes, bias = experts(fmt, 4, 36, 200), torch.tensor([3, 0, 1, 70], dtype=torch.int32), torch.randn(4, 36)
    x = torch.randn(77, 205)[:, 5:]
    got = grouped(x, w, sizes, bias)
    assert_close(got, OPS["gemm.grouped"].body(x, w, sizes, bias), scale=4)
    assert not got[74:].any()
    assert grouped(x[:0], w, torch.zeros_like(sizes)).shape == (0, 36)


ACTS = [
    ExpertSpec(),
    ExpertSpec(activation="swiglu_clamped", limit=1.0),
    ExpertSpec(activation="gelu_tanh", weight_on_input=True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 19])
def test_fused(num_tokens: int, act: ExpertSpec, dtype: torch.dtype) -> None:
    """Half of the experts are another rank's."""
    torch.manual_seed(0)
    w13, w2 = (OPS["quant.quantize"].body((0.2 * torch.randn(3, *s)).to(dtype), "dense") for s in ((48, 40), (40, 24)))
    bias13, bias2 = torch.randn(3, 48).to(dtype), torch.randn(3, 40).to(dtype)
    weights, ids = torch.rand(num_tokens, 2), torch.randint(0, 6, (num_tokens, 2)).int()
    x = torch.randn(num_tokens, 40).to(dtype)
    given = {"bias13": bias13, "bias2": bias2, "expert_map": torch.tensor([0, -1, 2, -1, 1, -1], dtype=torch.int32)}
    args = x, w13, w2, weights, ids, act
    assert_close(fused(*args, **given), OPS["moe.fused"].body(*args, **given), scale=4)


@pytest.mark.parametrize("fmt", FMTS[1:])
def test_fused_in_quantised_formats(fmt: str) -> None:
    torch.manual_seed(0)
    w13, w2 = experts(fmt, 3, 256, 128), experts(fmt, 3, 128, 128)
    x, weights, ids = torch.randn(9, 128), torch.rand(9, 2), torch.randint(0, 3, (9, 2)).int()
    args = x, w13, w2, weights, ids, ExpertSpec()
    assert_close(fused(*args), OPS["moe.fused"].body(*args), scale=200)


@pytest.mark.parametrize("fmt", ["dense", "fp8.block128", "int4.gptq.g32"])
def test_invariant_twins_give_a_row_the_same_bits_in_any_company(fmt: str) -> None:
    """700 tokens of two experts each are in larger tiles than one token, but here."""
    torch.manual_seed(0)
    w13, w2 = experts(fmt, 3, 128, 128), experts(fmt, 3, 128, 64)
    x, weights, ids = torch.randn(700, 128), torch.rand(700, 2), torch.randint(0, 3, (700, 2)).int()
    together = fused_invariant(x, w13, w2, weights, ids, ExpertSpec())
    one = slice(690, 691)
    assert torch.equal(fused_invariant(x[one], w13, w2, weights[one], ids[one], ExpertSpec()), together[one])
    assert_close(together[one], OPS["moe.fused"].body(x[one], w13, w2, weights[one], ids[one], ExpertSpec()), scale=200)
    sizes = torch.tensor([1, 0, 0], dtype=torch.int32)
    many = grouped_invariant(x, w13, 700 * sizes)
    assert torch.equal(grouped_invariant(x[:1], w13, sizes), many[:1])


def test_invariant_twins_ask_for_the_same_tiles_whatever_the_batch() -> None:
    """As the tiles of other devices may differ where those of this one do not."""
    asked: list[tuple[str, int]] = []

    def look(op: str, sizes: Mapping[str, Any]) -> None:
        asked.extend((op, sizes[name]) for name in ("S", "T") if name in sizes)

    w, x = experts("dense", 3, 8, 8), torch.randn(40, 8)
    with asking(look):
        for rows in (1, 40):
            grouped_invariant(x[:rows], w, torch.tensor([rows, 0, 0], dtype=torch.int32))
            mla_project_invariant(x[:rows, None], torch.randn(1, 8, 8))
    assert asked == [("moe.fused", INVARIANT_ROWS), ("attn.mla_project", INVARIANT_TOKENS)] * (len(asked) // 2)


ALLOCATIONS = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty)


class Launches(TorchDispatchMode):
    """The names of all that a GPU would run, in order: kernels, which do nothing meanwhile, and what is PyTorch's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        monkeypatch.setattr(
            interpreter.GridExecutor, "__call__", lambda run, *_, **__: self.names.append(run.fn.__name__)
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func.overloadpacket not in ALLOCATIONS:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("tokens", "expert_map", "sort"), [(64, None, ["_place"]), (64, 3, ["_place"]), (4096, None, ["_count", "_place"])]
)
def test_little_is_launched(
    tokens: int, expert_map: int | None, sort: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of a decode step is as long as what it launches, where its experts are small."""
    w13, w2 = experts("dense", 3, 64, 32), experts("dense", 3, 32, 32)
    mapped = None if expert_map is None else torch.arange(3, dtype=torch.int32)
    x, weights, ids = torch.zeros(tokens, 32), torch.zeros(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int32)
    with Launches(monkeypatch) as made:
        fused(x, w13, w2, weights, ids, ExpertSpec(), expert_map=mapped)
    zeroed = [] if expert_map is None else ["aten.zeros.default"]
    assert made.names == [*sort, "_grouped", "_gated", *zeroed, "_grouped", "_combine"]
