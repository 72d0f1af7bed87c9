"""Kernels run through Triton's interpreter here: set before triton is first imported, which is when it is read."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from importlib.metadata import version

import pytest
from packaging.requirements import Requirement
from sglang_triton import tuning
from sglang_triton.interpreter import quicken

quicken()


# What releases lack that these tests need, by the beginning of a test's name within its file.
LACKED = {
    "triton<3.7": {
        "test_triton_logits.py::test_mask": "its interpreter has no constants in bfloat16",
        "test_triton_sampling.py::test_every_kind_of_row": "its interpreter fills no uint32 with -1",
        "test_triton_sampling.py::test_rows_without_filters": "its interpreter fills no uint32 with -1",
        "test_triton_sampling.py::test_of_equals_the_lowest_ids_are_kept": "its interpreter fills no uint32 with -1",
        "test_triton_sampling.py::test_what_is_forbidden_is_never_drawn": "its interpreter fills no uint32 with -1",
    },
    "triton<3.9": {"test_triton_aot.py::test_each_kernel_keeps_its_budget_once": "budgets are of Triton 3.9"},
    "torch<2.12": {
        "test_gpu_linear.py::test_rows": "its scaled products are not there for a CPU",
        "test_gpu_linear.py::test_codes_give_the_bits_that_their_numbers_give[fp8.t": "its scaled products are not there for a CPU",
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for requirement, reasons in LACKED.items():
        wanted = Requirement(requirement)
        if version(wanted.name) not in wanted.specifier:
            continue
        for item in items:
            for name, reason in reasons.items():
                if f"/{name}" in f"/{item.nodeid}":
                    item.add_marker(pytest.mark.skip(reason=f"{requirement}: {reason}"))


@pytest.fixture(params=[tuning.INTERPRETER, "sm_90"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Kernels with the tile sizes of the interpreter, which are large, and with those of a device."""
    monkeypatch.setattr(tuning, "current_arch", lambda: request.param)
    tuning.choose.cache_clear()
    yield request.param
    tuning.choose.cache_clear()
