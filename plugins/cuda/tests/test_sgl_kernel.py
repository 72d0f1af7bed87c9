"""sgl-kernel is not installed here: its one function that is called, with the parameters of its release 0.3.21 and a body from its documentation, stands for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from flash_step import CPU, attend, bound, conformance, signature, spec_of, step, turned
from sglang_triton.gpu import optional
from torch import Tensor

from sglang_core.api.ops import OPS

PROVIDER = "sgl_kernel"
# Of flash_attn_with_kvcache, as sgl_kernel/flash_attn.py of sgl-kernel 0.3.21 has them.
SIGNATURE = signature(
    "q k_cache v_cache k= v= qv= rotary_cos= rotary_sin= cache_seqlens= cache_batch_idx= cache_leftpad= page_table= cu_seqlens_q= "
    "cu_seqlens_k_new= max_seqlen_q= rotary_seqlens= q_descale= k_descale= v_descale= softmax_scale= causal= window_size= "
    "attention_chunk= softcap= rotary_interleaved= scheduler_metadata= num_splits= pack_gqa= sm_margin= return_softmax_lse= sinks= "
    "score_mod= aux_tensors= ver="
)


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> Any:
    """Packed queries over pages. It allocates its results: rows of no req are whatever was there. lse: [Hq, T]."""
    given = SIGNATURE.bind(*args, **kwargs).arguments
    q, table, cu, lens = (given[name] for name in ("q", "page_table", "cu_seqlens_q", "cache_seqlens"))
    assert q.stride(-1) == 1 and table.is_contiguous()
    assert all(x.dtype == torch.int32 for x in (table, cu, lens)) and isinstance(given["max_seqlen_q"], int)
    assert int((cu[1:] - cu[:-1]).max()) <= given["max_seqlen_q"] and table.shape[0] == len(lens) == len(cu) - 1
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[1], q.shape[0]), torch.nan)
    for r, length in enumerate(lens.tolist()):
        rows = slice(int(cu[r]), int(cu[r + 1]))
        if rows.start == rows.stop:
            continue
        k, v = (given[name][table[r].long()].flatten(0, 1)[:length].float() for name in ("k_cache", "v_cache"))
        o, s = attend(q[rows].float(), k, v, given["softmax_scale"], given["softcap"], causal=given["causal"])
        out[rows], lse[:, rows] = o.to(q.dtype), s.T
    return (out, lse) if given["return_softmax_lse"] else out


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("sgl_kernel.flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgl_kernel", ModuleType("sgl_kernel"))
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", module)
    monkeypatch.delitem(sys.modules, "sglang_cuda.sgl_kernel_attention", raising=False)
    monkeypatch.setattr(optional, "version", lambda name: "0.3.21")
    yield
    sys.modules.pop("sglang_cuda.sgl_kernel_attention", None)


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("facts", [{}, {"soft_cap": 2.0}, {"num_kv_heads": 1, "scale": 0.3}, {"causal": False}])
@pytest.mark.parametrize("reqs", [[(0, 5), (7, 1), (0, 9)], [(8, 4), (0, 1)], [(3, 1), (4, 1)]])
def test_it_is_the_op(facts: dict[str, Any], reqs: list[tuple[int, int]]) -> None:
    spec = spec_of(**facts)
    ops = bound(spec)
    assert {op.provider for op in ops.values()} == {PROVIDER}
    pool, batch, new = step(spec, reqs)
    given = [leaf.clone() for leaf in pool.leaves]
    want = OPS["attn.paged"].body(*new, pool, 1, spec, OPS["attn.plan"].body(spec, batch, CPU), lse=True)
    plan = ops["attn.plan"].fn(spec, batch, CPU)
    pool.leaves = given
    close(ops["attn.paged"].fn(*new, pool, 1, spec, plan, lse=True), want)
    written_already = (new[0], None, None)
    close(ops["attn.paged"].fn(*written_already, pool, 1, spec, plan, lse=True), want)
    assert isinstance(ops["attn.paged"].fn(*written_already, pool, 1, spec, plan), Tensor)


@pytest.mark.usefixtures("installed")
def test_heads_are_rotated_and_written_by_one_launch_before_it() -> None:
    spec = spec_of()
    ops = bound(spec)
    assert [kernel.fn for kernel in ops["attn.rope_paged"].kernels] == ["sglang_cuda.sgl_kernel_attention:rope_paged"]
    got, want = turned(ops, spec, [(0, 5), (7, 1)])
    torch.testing.assert_close(got[0], want[0], rtol=2**-7, atol=2e-2)
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-2)


@pytest.mark.usefixtures("installed")
def test_a_bucket_has_zeros_where_there_is_no_req_and_keeps_its_buffers() -> None:
    spec = spec_of()
    ops = bound(spec)
    _, first, _ = step(spec, [(9, 1), (2, 1)], padding=2)
    plan = ops["attn.plan"].fn(spec, first, CPU)
    places = [buffer.data_ptr() for buffer in plan.buffers()]
    pool, batch, new = step(spec, [(3, 1), (8, 1)], padding=2)
    want = OPS["attn.paged"].body(*new, pool, 1, spec, OPS["attn.plan"].body(spec, batch, CPU), lse=True)
    assert ops["attn.plan"].fn(spec, batch, CPU, plan) is plan
    assert [buffer.data_ptr() for buffer in plan.buffers()] == places
    close(ops["attn.paged"].fn(*new, pool, 1, spec, plan, lse=True), want)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("op", ["attn.paged", "attn.rope_paged"])
def test_the_suite_finds_nothing_wrong_in_what_it_takes(op: str) -> None:
    passed, failed = conformance(PROVIDER, op, arch=90)
    assert passed >= 28 and not failed, failed


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("facts", "more", "reason"),
    [
        ({"window": 8}, {}, "not called for windows"),
        ({"has_sinks": True, "tree": True}, {}, "not called for sinks, trees of drafts"),
        ({"kv_dtype": "fp8_e4m3"}, {}, "keys in fp8_e4m3"),
        ({"head_dim": 96, "v_head_dim": 96}, {}, "heads of 64, 128, 256, not 96 and 96"),
        ({}, {"page_size": 64}, "pages of at most 32, not 64"),
        ({}, {"arch": 100}, "on cuda/sm_90, not on cuda/sm_100"),
    ],
)
def test_what_it_is_not_for(facts: dict[str, Any], more: dict[str, int], reason: str) -> None:
    op = bound(spec_of(**facts), **more)["attn.paged"]
    assert op.provider == "triton"
    assert any(kernel.startswith(PROVIDER) and reason in why for kernel, why in op.refused)


@pytest.mark.parametrize("found", ["0.3.20", "0.4.0"])
def test_another_release_is_refused_with_its_number(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "version", lambda name: found)
    op = bound(spec_of())["attn.paged"]
    assert op.provider == "triton" and any(f"and {found} is installed" in why for _, why in op.refused)


def test_where_it_is_not_installed_explain_says_how_to_get_it() -> None:
    op = bound(spec_of())["attn.paged"]
    assert op.provider == "triton" and "sglang_cuda.sgl_kernel_attention" not in sys.modules
    assert any("pip install 'sgl-kernel>=0.3.21,<0.3.22'" in why for _, why in op.refused)
