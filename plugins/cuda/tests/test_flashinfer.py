"""FlashInfer is not installed here: a wrapper with the parameters of its release 0.7.2, and a body from its documentation, stands for it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from flash_step import CPU, attend, bound, signature, spec_of, step, turned
from sglang_triton.gpu import optional

from sglang_core.api.ops import OPS

# Of BatchPrefillWithPagedKVCacheWrapper, as flashinfer/prefill.py of flashinfer-python 0.7.2.post1 has them.
INIT = signature(
    "float_workspace_buffer kv_layout= use_cuda_graph= qo_indptr_buf= paged_kv_indptr_buf= paged_kv_indices_buf= "
    "paged_kv_last_page_len_buf= custom_mask_buf= mask_indptr_buf= backend= jit_args= jit_kwargs= variant_owns_mask="
)
PLAN = signature(
    "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim_qk page_size "
    "head_dim_vo= custom_mask= packed_custom_mask= causal= pos_encoding_mode= use_fp16_qk_reduction= sm_scale= window_left= "
    "logits_soft_cap= rope_scale= rope_theta= q_data_type= kv_data_type= o_data_type= non_blocking= prefix_len_ptr= "
    "token_pos_in_items_ptr= token_pos_in_items_len= max_item_len_ptr= seq_lens= seq_lens_q= block_tables= "
    "max_token_per_sequence= max_sequence_kv= fixed_split_size= disable_split_kv= uniform_q_len="
)
RUN = signature(
    "q paged_kv_cache",
    **dict.fromkeys(("q_scale", "k_scale", "v_scale", "out", "lse")),
    return_lse=False,
    lse_base="log2",
    lse_layout="NH",
    **dict.fromkeys(("enable_pdl", "window_left", "sinks", "kv_cache_sf", "skip_softmax_threshold_scale_factor")),
    **dict.fromkeys(("use_fp16_softmax", "uses_spcompress")),
)


class Wrapper:
    """Attention of the planned batch, req by req, over pages [N, P, Hk, D]."""

    made: list[Wrapper]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = INIT.bind(*args, **kwargs).arguments
        assert bound["kv_layout"] == "NHD" and bound["float_workspace_buffer"].dtype == torch.uint8
        self.made.append(self)

    def plan(self, *args: Any, **kwargs: Any) -> None:
        bound = PLAN.bind(*args, **kwargs)
        self.planned = bound.arguments
        for name in ("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"):
            assert self.planned[name].dtype == torch.int32, name
        assert self.planned["q_data_type"] is self.planned["kv_data_type"] is torch.bfloat16

    def run(self, *args: Any, **kwargs: Any) -> Any:
        bound = RUN.bind(*args, **kwargs)
        bound.apply_defaults()
        given, p = bound.arguments, self.planned
        q, (k_cache, v_cache), out, lse = given["q"], given["paged_kv_cache"], given["out"], given["lse"]
        assert q.is_contiguous()
        q_at, page_at = p["qo_indptr"].tolist(), p["paged_kv_indptr"].tolist()
        for r, last in enumerate(p["paged_kv_last_page_len"].tolist()):
            pages = p["paged_kv_indices"][page_at[r] : page_at[r + 1]].long()
            if q_at[r] == q_at[r + 1] or not len(pages):
                continue
            length = (len(pages) - 1) * p["page_size"] + last
            k, v = (cache[pages].flatten(0, 1)[:length].float() for cache in (k_cache, v_cache))
            rows = slice(q_at[r], q_at[r + 1])
            o, s = attend(q[rows].float(), k, v, p["sm_scale"], p["logits_soft_cap"], causal=p["causal"])
            out[rows] = o.to(out.dtype)
            if given["return_lse"]:
                lse[rows] = s if given["lse_base"] == "ln" else s / math.log(2)
        return (out, lse) if given["return_lse"] else out


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("flashinfer")
    Wrapper.made = []
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.delitem(sys.modules, "sglang_cuda.flashinfer_kernels", raising=False)
    monkeypatch.setattr(optional, "version", lambda name: "0.7.2.post1")
    yield
    sys.modules.pop("sglang_cuda.flashinfer_kernels", None)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("facts", [{}, {"soft_cap": 2.0}, {"num_kv_heads": 1, "scale": 0.3}, {"causal": False}])
@pytest.mark.parametrize("reqs", [[(0, 5), (7, 1), (0, 9)], [(8, 4), (0, 1)], [(3, 1), (4, 1)]])
def test_it_is_the_op(facts: dict[str, Any], reqs: list[tuple[int, int]]) -> None:
    spec = spec_of(**facts)
    ops = bound(spec)
    assert {op.provider for op in ops.values()} == {"flashinfer"}
    pool, batch, new = step(spec, reqs)
    given = [leaf.clone() for leaf in pool.leaves]
    want, want_lse = OPS["attn.paged"].body(*new, pool, 1, spec, OPS["attn.plan"].body(spec, batch, CPU), lse=True)
    for keys in (new[1:], [None, None]):  # to be written; written already
        plan = ops["attn.plan"].fn(spec, batch, CPU)
        if keys[0] is not None:
            pool.leaves = [leaf.clone() for leaf in given]
        o, lse = ops["attn.paged"].fn(new[0], *keys, pool, 1, spec, plan, lse=True)
        torch.testing.assert_close(o, want, rtol=2**-7, atol=1e-2)
        torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)  # of e, as attn.merge takes it
        assert torch.equal(ops["attn.paged"].fn(new[0], *keys, pool, 1, spec, plan), o)


@pytest.mark.usefixtures("installed")
def test_heads_are_rotated_and_written_by_one_launch_before_it() -> None:
    spec = spec_of()
    ops = bound(spec)
    assert [kernel.fn for kernel in ops["attn.rope_paged"].kernels] == ["sglang_cuda.flashinfer_kernels:rope_paged"]
    for got, want in zip(*turned(ops, spec, [(0, 5), (7, 1)]), strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=2e-2)
    assert Wrapper.made


@pytest.mark.usefixtures("installed")
def test_a_step_that_becomes_a_graph_is_tritons() -> None:
    spec = spec_of()
    ops = bound(spec)
    pool, batch, new = step(spec, [(3, 1), (4, 1)], static=True)
    plan = ops["attn.plan"].fn(spec, batch, CPU)
    assert type(plan).__module__ == "sglang_triton.attention_plan" and not Wrapper.made
    want = OPS["attn.paged"].body(*new, pool, 1, spec, OPS["attn.plan"].body(spec, batch, CPU))
    torch.testing.assert_close(ops["attn.paged"].fn(*new, pool, 1, spec, plan), want, rtol=2**-7, atol=1e-2)


@pytest.mark.usefixtures("installed")
def test_a_plan_outlives_the_plans_of_the_next_steps() -> None:
    """Two steps are under way while a third is planned."""
    spec = spec_of()
    ops = bound(spec)
    steps = [step(spec, [(0, n), (n, 2)]) for n in (3, 5, 6)]
    plans = [ops["attn.plan"].fn(spec, batch, CPU) for _, batch, _ in steps]
    for (pool, batch, new), plan in zip(steps, plans, strict=True):
        want = OPS["attn.paged"].body(*new, pool, 1, spec, OPS["attn.plan"].body(spec, batch, CPU))
        torch.testing.assert_close(ops["attn.paged"].fn(*new, pool, 1, spec, plan), want, rtol=2**-7, atol=1e-2)
    workspaces = {id(plan.wrapper) for plan in plans}
    assert len(workspaces) == 3


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"window": 8}, "not called for windows"),
        ({"has_sinks": True, "tree": True}, "not called for sinks, trees of drafts"),
        ({"kv_dtype": "fp8_e4m3"}, "keys in fp8_e4m3"),
        ({"head_dim": 96, "v_head_dim": 96}, "heads of 64, 128, 256, not 96 and 96"),
    ],
)
def test_what_it_is_not_for(facts: dict[str, Any], reason: str) -> None:
    op = bound(spec_of(**facts))["attn.paged"]
    assert op.provider == "triton"
    assert any(kernel.startswith("flashinfer") and reason in why for kernel, why in op.refused)


@pytest.mark.parametrize("found", ["0.6.1", "0.8.0"])
def test_another_release_is_refused_with_its_number(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "version", lambda name: found)
    op = bound(spec_of())["attn.paged"]
    assert op.provider == "triton" and any(f"and {found} is installed" in why for _, why in op.refused)


def test_where_it_is_not_installed_explain_says_how_to_get_it() -> None:
    op = bound(spec_of())["attn.paged"]
    assert op.provider == "triton" and "sglang_cuda.flashinfer_kernels" not in sys.modules
    assert any("pip install 'flashinfer-python>=0.7.2,<0.8'" in why for _, why in op.refused)
