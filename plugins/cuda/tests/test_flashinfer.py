"""FlashInfer is not installed here: a wrapper with the parameters of its release 0.7.2, and a body from its documentation, stands for it."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from sglang_cuda import optional
from sglang_cuda.backend import CudaBackend
from torch import Tensor

from sglang_core.api import DeviceInfo, OpSite, Pool, PoolSpec
from sglang_core.api.ops import OPS, AttnBatch, AttnSpec
from sglang_core.backend.selection import BoundOp, OpTable

CPU = torch.device("cpu")
OPS_OF_ATTENTION = ("attn.paged", "attn.plan", "kv.write")
REQUIRED = inspect.Parameter.empty


def signature(positional: str, **keywords: Any) -> inspect.Signature:
    """Names in order; `=` marks those that have a default. `keywords` may only be given by name."""
    kind = inspect.Parameter
    made = [
        kind(name.rstrip("="), kind.POSITIONAL_OR_KEYWORD, default=None if name.endswith("=") else REQUIRED)
        for name in positional.split()
    ]
    return inspect.Signature([*made, *(kind(name, kind.KEYWORD_ONLY, default=d) for name, d in keywords.items())])


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
            o, s = self.attend(q[rows].float(), k, v)
            out[rows] = o.to(out.dtype)
            if given["return_lse"]:
                lse[rows] = s if given["lse_base"] == "ln" else s / math.log(2)
        return (out, lse) if given["return_lse"] else out

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        p, group = self.planned, q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,shd->hts", q, k) * p["sm_scale"]
        if cap := p["logits_soft_cap"]:
            scores = cap * torch.tanh(scores / cap)
        if p["causal"]:
            seen = torch.ones(len(q), len(k)).tril(len(k) - len(q)).bool()
            scores = scores.masked_fill(~seen, float("-inf"))
        return torch.einsum("hts,shd->thd", scores.softmax(-1), v), scores.logsumexp(-1).T


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


def spec_of(**facts: Any) -> AttnSpec:
    return AttnSpec(**({"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "v_head_dim": 64, "scale": 0.125} | facts))


def bound(spec: AttnSpec, **more: Any) -> dict[str, BoundOp]:
    info = DeviceInfo(backend="cuda", path="cuda/sm_90", name="test")
    table = OpTable(info, CudaBackend(), ops=OPS, page_size=4, **more)
    return table.bind_group([OpSite(op=op, layer="Attention", dtype="bfloat16", spec=spec) for op in OPS_OF_ATTENTION])


def step(spec: AttnSpec, reqs: list[tuple[int, int]], *, static: bool = False) -> tuple[Pool, AttnBatch, list[Tensor]]:
    """reqs: (prefix, extend) each. Pages in random order; slots that nobody wrote hold NaN."""
    torch.manual_seed(0)
    lens, size = [prefix + extend for prefix, extend in reqs], 4
    pages = [-(-n // size) for n in lens]
    shape = {"num_kv_heads": spec.num_kv_heads, "head_dim": spec.head_dim, "v_head_dim": spec.v_head_dim}
    pool = Pool(PoolSpec(num_layers=2, page_size=size, dtype=torch.bfloat16, **shape), sum(pages) + 1, CPU)
    pool.poison(range(pool.num_pages))
    table, new = torch.zeros(len(reqs), max(pages) + 1, dtype=torch.int32), []
    for r, own in enumerate((torch.randperm(sum(pages)) + 1).int().split(pages)):
        slots = (own[:, None] * size + torch.arange(size, dtype=torch.int32)).flatten()[: lens[r]]
        table[r, : pages[r]] = own
        new.append(slots[reqs[r][0] :])
        pool.scatter(1, slots[: reqs[r][0]], *torch.randn(2, reqs[r][0], spec.num_kv_heads, spec.head_dim).bfloat16())
    cu = torch.tensor([0, *(extend for _, extend in reqs)]).cumsum(0).int()
    batch = AttnBatch(
        cu_extend_cpu=cu,
        prefix_lens_cpu=torch.tensor([prefix for prefix, _ in reqs]).int(),
        seq_lens_cpu=torch.tensor(lens).int(),
        page_table_cpu=table,
        slot_mapping_cpu=torch.cat(new),
        num_tokens=int(cu[-1]),
        num_reqs=len(reqs),
        max_extend=max(extend for _, extend in reqs),
        num_pages=table.shape[1],
        page_size=size,
        static=static,
    )
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    return pool, batch, [torch.randn(int(cu[-1]), n, spec.head_dim).bfloat16() for n in heads]


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
