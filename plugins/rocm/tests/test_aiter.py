"""AITER's attention over packed rows, by a stand-in (aiter_fake.py), through selection against the op."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from sglang_conformance.runner import Suite, Verdict
from sglang_rocm.backend import RocmBackend
from sglang_triton.gpu import optional

from sglang_core.api import DeviceInfo, DeviceRuntime, KernelContext, OpSite, RuntimeContext
from sglang_core.api.ops import OPS, AttnSpec, RaggedBatch
from sglang_core.backend.selection import BoundOp, OpTable
from sglang_core.backend.torch_runtime import TorchRuntime

PROVIDER, MODULE = "aiter", "sglang_rocm.aiter_attention"


def spec_of(**facts: Any) -> AttnSpec:
    return AttnSpec(**({"num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "v_head_dim": 128, "scale": 0.125} | facts))


def bound(spec: AttnSpec, *, target: str = "gfx942", dtype: str = "bfloat16") -> BoundOp:
    info = DeviceInfo(backend="rocm", path=f"rocm/{target}", name="test")
    table = OpTable(info, RocmBackend(), ops=OPS, page_size=16)
    return table.bind(OpSite(op="attn.ragged", layer="Attention", dtype=dtype, spec=spec))


@pytest.mark.usefixtures("aiter")
@pytest.mark.parametrize(
    "facts", [{}, {"causal": False}, {"head_dim": 192, "num_kv_heads": 4, "scale": 0.1}, {"num_kv_heads": 1}]
)
@pytest.mark.parametrize(
    "lens", [[(5, 9), (0, 0), (1, 1), (7, 3), (3, 0)], [(1, 6), (1, 2), (0, 4)], [(4, 0)]], ids=str
)
def test_it_is_the_op(facts: dict[str, Any], lens: list[tuple[int, int]]) -> None:
    """Reqs without queries or keys, fewer keys than queries, single queries, and rows of no req at the end."""
    torch.manual_seed(0)
    spec = spec_of(**facts)
    op = bound(spec)
    assert op.provider == PROVIDER
    batch = RaggedBatch.of(*zip(*lens, strict=True), torch.device("cpu"))
    q = torch.randn(int(batch.cu_q[-1]) + 2, spec.num_heads, spec.head_dim).bfloat16()
    k, v = (torch.randn(int(batch.cu_k[-1]), spec.num_kv_heads, d).bfloat16() for d in (spec.head_dim, spec.v_head_dim))
    want, want_lse = OPS["attn.ragged"].body(q, k, v, batch, spec, lse=True)
    got, lse = op.fn(q, k, v, batch, spec, lse=True)
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)
    assert torch.equal(op.fn(q, k, v, batch, spec), got)


@pytest.mark.usefixtures("aiter")
def test_heads_at_odd_places_are_copied_and_others_are_not() -> None:
    bound(spec_of())
    from sglang_rocm.aiter_attention import aligned

    x = torch.randn(3, 2, 136).bfloat16()
    for start, same in ((8, True), (3, False)):
        found = aligned(x[..., start : start + 128])
        assert torch.equal(found, x[..., start : start + 128])
        assert (found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == same
        assert found.data_ptr() % 16 == 0


class HostRocm(RocmBackend):
    """The kernels of AMD GPUs on host tensors."""

    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime:
        return TorchRuntime(ctx, "cpu")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("aiter")
@pytest.mark.parametrize(("op", "least"), [("attn.ragged", 2), ("attn.paged", 2)])
def test_the_suite_finds_nothing_wrong_in_what_it_takes(op: str, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_rocm import aiter_paged

    monkeypatch.setattr(aiter_paged, "MANY", 4)
    backend = HostRocm()
    info = DeviceInfo(backend="rocm", path="rocm/gfx942", name="test", total_memory=1 << 36)
    kernels = [k for k in backend.kernels(KernelContext(device=info)) if k.provider == PROVIDER]
    suite = Suite(backend, info, kernels=kernels, full=False)
    cases = [(case, dtype) for case, dtype in suite.select([f"{op}["]) if dtype == torch.bfloat16]
    results = [suite.judge(case, dtype) for case, dtype in cases]
    failed = [f"{r.title}: {r.reason}" for r in results if r.verdict is Verdict.FAIL]
    assert not [text for text in failed if "every kernel refuses" not in text]
    assert sum(r.verdict is Verdict.PASS and r.provider == PROVIDER for r in results) >= least


@pytest.mark.usefixtures("aiter")
@pytest.mark.parametrize(
    ("facts", "more", "reason"),
    [
        ({"head_dim": 64, "v_head_dim": 64}, {}, "heads of 128 with values of 128 or 192 with values of 128, not 64 and 64"),
        ({"window": 1}, {}, "is not called for windows"),
        ({"soft_cap": 30.0}, {}, "is not called for soft caps"),
        ({}, {"dtype": "float16"}, "in bfloat16, not float16"),
        ({"head_dim": 192, "scale": 0.1}, {"target": "gfx950"}, "by 0.072169 on rocm/gfx950, whatever is asked for; this is 0.100000"),
    ],
)  # fmt: skip
def test_what_it_is_not_for(facts: dict[str, Any], more: dict[str, str], reason: str) -> None:
    op = bound(spec_of(**facts), **more)
    assert op.provider == "triton"
    assert any(kernel.startswith(PROVIDER) and reason in why for kernel, why in op.refused)


@pytest.mark.usefixtures("aiter")
def test_scaled_by_the_root_of_their_size_heads_of_192_are_taken_there_too() -> None:
    assert bound(spec_of(head_dim=192, scale=192**-0.5), target="gfx950").provider == PROVIDER


@pytest.mark.parametrize("found", ["0.1.20", "0.1.23", "0.1.29+rocm7.2.manylinux.2.28"])
def test_another_release_is_refused_with_its_number(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "version", lambda name: found)
    op = bound(spec_of())
    assert op.provider == "triton" and any(f"and {found} is installed" in why for _, why in op.refused)


def test_where_it_is_not_installed_explain_says_where_it_is() -> None:
    op = bound(spec_of())
    assert op.provider == "triton" and MODULE not in sys.modules
    assert any("amd-aiter>=0.1.21,<0.1.23 from https://github.com/ROCm/aiter/releases" in why for _, why in op.refused)
