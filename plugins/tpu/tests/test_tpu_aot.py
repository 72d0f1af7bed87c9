"""Kernels compiled by libtpu for TPUs that are not here."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jax")
pytest.importorskip("libtpu")

import jax
import jax.numpy as jnp
from sglang_tpu import aot
from sglang_tpu.chips import CHIPS

BUDGETS = json.loads((Path(__file__).parents[3] / "benchmarks" / "tpu" / "budgets.json").read_text())[aot.SECTION]


def test_every_kernel_has_a_budget_for_every_chip() -> None:
    titles = {chip: {spec.title for spec in aot.specs() if chip in spec.chips} for chip in CHIPS}
    assert {chip: set(of_chip) for chip, of_chip in BUDGETS.items()} == titles


@pytest.mark.parametrize(
    "only",
    [
        "attn.paged[8 of 2 heads",
        "attn.mla_paged[16 heads, decode",
        "gemm.linear[fp8.block128, gate_up, 16 ",
        "moe.fused[dense, qwen3-30b-a3b, width of 4 ranks, 16 ",
    ],
)
def test_a_kernel_compiles_within_its_budget(only: str) -> None:
    (spec,) = aot.specs(only)
    used, wrong = aot.problems(spec, "v6e", BUDGETS["v6e"][spec.title])
    assert not wrong and used is not None and used.vmem > 0
    _, wrong = aot.problems(spec, "v6e", {"vmem": used.vmem - 1, "temporary": used.temporary})
    assert wrong == [f"{used.vmem} bytes of vmem, and its budget is {used.vmem - 1}"]


def test_a_pool_that_is_turned_around_is_found() -> None:
    """Rows of 64 of 128 lanes: XLA keeps them in another order than a kernel reads."""
    (spec,) = aot.specs("attn.paged[8 of 2 heads")
    queries, new, leaves, *rest = spec.args
    narrow = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct((*x.shape[:-1], 64), x.dtype))
    _, wrong = aot.problems(replace(spec, args=(narrow(queries), narrow(new), narrow(leaves), *rest)), "v6e", None)
    assert any("copies" in line for line in wrong)


def test_what_does_not_fit_vmem_is_an_error() -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def double(x: Any) -> Any:
        whole = pl.BlockSpec(memory_space=pltpu.VMEM)
        return pl.pallas_call(
            lambda i, o: o.__setitem__(..., i[...] * 2), out_shape=x, in_specs=[whole], out_specs=whole
        )(x)

    spec = aot.AotSpec(
        op="double", case="1 GiB", fn=double, args=(jax.ShapeDtypeStruct((1 << 20, 256), jnp.float32),), uncopied=0
    )
    used, wrong = aot.problems(spec, "v6e", None)
    assert used is None and "does not compile" in wrong[0] and "vmem" in wrong[0].lower()
