"""Where a model calls an op: sites of its own, and wholes that have it in them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sglang_core.backend.devices import open_device
from sglang_core.backend.kernel import OpSite
from sglang_core.backend.selection import DECOMPOSED, REFERENCE, OpTable
from sglang_core.bench.places import bound_at, passed_over, places, provider_of, runners
from sglang_core.config import EngineConfig
from sglang_core.engine.explain import bound_model
from sglang_core.engine.resolve import resolve
from sglang_core.ops import OPS
from tests.bench.fake_providers import acme

PRODUCT = OpSite(op="gemm.linear", layer="GateUpLinear", dtype="float32", fmt="dense", dims={"in": 8, "out": 16})
ACT = OpSite(op="act.gated", layer="GatedMLP", dtype="float32", spec="silu", dims={"F": 8})
WHOLE = replace(PRODUCT, op="gemm.linear_gated", spec="silu", parts=(PRODUCT, ACT))
ALL = [acme("gemm.linear", "linear"), acme("gemm.linear_gated", "linear_gated")]


def table(**settings: object) -> OpTable:
    chosen = open_device("cpu")
    return OpTable(chosen.info, chosen.backend, ops=OPS, kernels=ALL, **settings)  # type: ignore[arg-type]


def fused() -> OpTable:
    """As a layer binds them where one kernel has both."""
    t = table()
    for site in (PRODUCT, ACT, WHOLE):
        t.bind(site)
    return t


def apart() -> OpTable:
    t = table(overrides={"gemm.linear": REFERENCE})
    for site in (PRODUCT, ACT):
        t.bind(site)
    return t


@pytest.mark.parametrize("op", ["gemm.linear", "act.gated", "gemm.linear_gated"])
def test_a_whole_stands_for_its_parts(op: str) -> None:
    """Even if only one of the tables has it."""
    assert places([apart(), fused()], op) == [WHOLE]
    assert places([apart()], op) == [site for site in (PRODUCT, ACT) if site.op == op]


def test_a_whole_is_put_together_where_there_is_none() -> None:
    found = bound_at(fused(), WHOLE)
    assert (found.provider, runners(fused(), found)[0][0]) == ("acme", "acme")
    other = apart()
    found = bound_at(other, WHOLE)
    assert found.provider == DECOMPOSED
    assert runners(other, found) == [(REFERENCE, None), (REFERENCE, None)]
    assert provider_of(other, found, "gemm.linear") == REFERENCE
    assert not [b for b in other.bound_ops if b.site == WHOLE], "nothing is bound that the layer would not bind"


def test_norms_of_heads_are_called_within_attention() -> None:
    """Of the demo model, which norms queries and keys: by themselves only norms of the hidden size are called."""
    t, _ = bound_model(resolve(EngineConfig.from_flat(model_path="demo", device="cpu")))
    found = {(site.op, site.dims.get("M")) for site in places([t], "norm.rms")}
    assert found == {("norm.rms", 256), ("norm.add_rms", 256), ("attn.rope_paged", None)}


def test_what_is_made_of_it_and_cannot_be_called_is_named() -> None:
    t = fused()
    t.bind(replace(ACT, op="act.gated_quant", fmt="fp8.token"))
    assert passed_over(t, "act.gated") == ["act.gated_quant"]
    assert passed_over(t, "gemm.linear") == []
