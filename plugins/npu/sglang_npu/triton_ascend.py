"""Recurrent ops by the kernels of sglang-triton, where triton-ascend is there to compile them: the vendor's library has none. Imports neither it nor torch.

triton-ascend is Triton 3.2 with another backend, and installs itself in Triton's place.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.specifiers import SpecifierSet

from sglang_core.api import Kernel, SelectionContext

PROVIDER = "triton"
PACKAGE, RELEASES = "triton-ascend", ">=3.2,<3.3"
HOW = "pip install 'sglang-npu[triton]'"
BELOW_OURS = 40
FUNCTIONS = {
    "ssm.gated_delta_rule": "sglang_triton.gated_delta:gated_delta_rule",
    "ssm.causal_conv1d": "sglang_triton.causal_conv:causal_conv1d",
    "ssm.gates": "sglang_triton.gates:gates",
}


def kernels() -> list[Kernel]:
    """Offered where they cannot run too, so that `explain` says what is missing."""
    supports = partial(limits, problem())
    return [
        Kernel(
            op,
            provider=PROVIDER,
            fn=fn,
            device=("npu",),
            priority=BELOW_OURS,
            supports=supports,
            note="compiled by triton-ascend",
        )
        for op, fn in FUNCTIONS.items()
    ]


def problem() -> str:
    """What of the packages is missing or wrong: "" or a reason."""
    if (found := _installed(PACKAGE)) is None:
        return f"{PACKAGE} is not installed; {HOW}"
    if found not in SpecifierSet(RELEASES, prereleases=True):
        return f"it is written for {PACKAGE} {RELEASES}, and {found} is installed"
    if (other := _installed("triton")) is not None:
        return (
            f"triton {other} is installed beside {PACKAGE}, in the same folder; uninstall both, then install {PACKAGE}"
        )
    return "" if find_spec("sglang_triton") else f"sglang-triton is not installed; {HOW}"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def limits(missing: str, ctx: SelectionContext) -> str | None:
    if missing:
        return missing
    if ctx.device.facts.get("emulated"):
        return f"{PACKAGE} compiles for NPUs, and this one is emulated"
    from sglang_triton.kernels import dtype_limits, state_limits  # only where it is installed

    return (state_limits if ctx.site.op == "ssm.gated_delta_rule" else dtype_limits)(ctx)
