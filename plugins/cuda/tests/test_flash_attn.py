"""FlashAttention-2 is not installed here: its one function that is called, with the parameters of its release 2.8.3.post2 and a body from its documentation and checks, stands for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from flash_step import conformance, signature, spec_of
from sglang_cuda.backend import CudaBackend
from sglang_triton.gpu import optional

from sglang_core.api import DeviceInfo, OpSite
from sglang_core.api.ops import OPS, AttnSpec, RaggedBatch
from sglang_core.backend.selection import BoundOp, OpTable

# Of flash_attn_varlen_func, as flash_attn/flash_attn_interface.py of flash-attn 2.8.3.post2 has them.
SIGNATURE = signature(
    "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p= softmax_scale= causal= window_size= softcap= "
    "alibi_slopes= deterministic= return_attn_probs= block_table="
)


def flash_attn_varlen_func(*args: Any, **kwargs: Any) -> Any:
    """Rows of no req are whatever was there; a row without keys gives zeros and +inf. lse: [Hq, T]."""
    given = SIGNATURE.bind(*args, **kwargs).arguments
    q, k, v, cu_q, cu_k = (given[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"))
    assert q.dtype == k.dtype == v.dtype and cu_q.dtype == cu_k.dtype == torch.int32
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert q.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0
    longest = [int((cu[1:] - cu[:-1]).max()) for cu in (cu_q, cu_k)]
    assert longest[0] <= given["max_seqlen_q"] and longest[1] <= given["max_seqlen_k"]
    # Queries of one token are folded into their groups, a req each.
    assert given["max_seqlen_q"] > 1 or q.shape[0] == len(cu_q) - 1
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan)
    group, (left, right) = q.shape[1] // k.shape[1], given["window_size"]
    for a, b, c, d in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), cu_k[:-1].tolist(), cu_k[1:].tolist(), strict=True):
        keys, values = (x[c:d].float().repeat_interleave(group, dim=1) for x in (k, v))
        s = torch.einsum("thd,shd->hts", q[a:b].float(), keys) * given["softmax_scale"]
        s = given["softcap"] * torch.tanh(s / given["softcap"]) if given["softcap"] else s
        at = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        key = torch.arange(d - c)[None]
        seen = torch.ones(b - a, d - c).bool()
        seen &= (key <= at) if given["causal"] else seen
        seen &= (key >= at - left) if left >= 0 else seen
        seen &= (key <= at + right) if right >= 0 else seen
        s = s.masked_fill(~seen, float("-inf"))
        out[a:b] = torch.einsum("hts,shd->thd", s.softmax(-1).nan_to_num(0.0), values).to(q.dtype)
        lse[:, a:b] = s.logsumexp(-1).nan_to_num(neginf=float("inf"))
    return (out, lse, None) if given["return_attn_probs"] else out


def bound(spec: AttnSpec, *, arch: int = 80, dtype: str = "bfloat16") -> BoundOp:
    info = DeviceInfo(backend="cuda", path=f"cuda/sm_{arch}", name="test")
    table = OpTable(info, CudaBackend(), ops=OPS, page_size=16)
    return table.bind(OpSite(op="attn.ragged", layer="Attention", dtype=dtype, spec=spec))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.delitem(sys.modules, "sglang_cuda.flash_attn_kernels", raising=False)
    monkeypatch.setattr(optional, "version", lambda name: "2.8.3.post2")
    yield
    sys.modules.pop("sglang_cuda.flash_attn_kernels", None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "facts",
    [{}, {"causal": False}, {"window": 5}, {"soft_cap": 2.0}, {"head_dim": 72, "v_head_dim": 72, "num_kv_heads": 4}],
)
@pytest.mark.parametrize(
    "lens", [[(5, 9), (0, 0), (1, 1), (7, 3), (3, 0)], [(1, 6), (1, 2), (0, 4)], [(4, 0)]], ids=str
)
def test_it_is_the_op(facts: dict[str, Any], lens: list[tuple[int, int]]) -> None:
    """Reqs without queries or keys, fewer keys than queries, single queries, and rows of no req at the end."""
    torch.manual_seed(0)
    spec = spec_of(**facts)
    op = bound(spec)
    assert op.provider == "flash_attn"
    batch = RaggedBatch.of(*zip(*lens, strict=True), torch.device("cpu"))
    q = torch.randn(int(batch.cu_q[-1]) + 2, spec.num_heads, spec.head_dim).bfloat16()
    k, v = torch.randn(2, int(batch.cu_k[-1]), spec.num_kv_heads, spec.head_dim).bfloat16()
    want, want_lse = OPS["attn.ragged"].body(q, k, v, batch, spec, lse=True)
    got, lse = op.fn(q, k, v, batch, spec, lse=True)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    assert torch.equal(op.fn(q, k, v, batch, spec), got)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("installed")
def test_the_suite_finds_nothing_wrong_in_what_it_takes() -> None:
    passed, failed = conformance("flash_attn", "attn.ragged", arch=80)
    assert passed >= 20 and not failed, failed


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("facts", "more", "reason"),
    [
        ({"head_dim": 192}, {}, "not 192 and 64"),
        ({"head_dim": 20, "v_head_dim": 20}, {}, "not 20 and 20"),
        ({}, {"arch": 90}, "is called before sm_90"),
        ({}, {"dtype": "float32"}, "not float32"),
    ],
)
def test_what_it_is_not_for(facts: dict[str, Any], more: dict[str, Any], reason: str) -> None:
    op = bound(spec_of(**facts), **more)
    assert op.provider == "triton"
    assert any(kernel.startswith("flash_attn") and reason in why for kernel, why in op.refused)


def test_where_it_is_not_installed_explain_says_how_to_get_it() -> None:
    op = bound(spec_of())
    assert op.provider == "triton" and "sglang_cuda.flash_attn_kernels" not in sys.modules
    assert any("pip install 'flash-attn>=2.8.3,<2.9'" in why for _, why in op.refused)


@pytest.mark.parametrize("found", ["2.7.4.post1", "2.9.0"])
def test_another_release_is_refused_with_its_number(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "version", lambda name: found)
    op = bound(spec_of())
    assert op.provider == "triton" and any(f"and {found} is installed" in why for _, why in op.refused)
