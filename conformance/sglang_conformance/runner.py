"""Runs cases on a device and judges them."""

from __future__ import annotations

import enum
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, all_cases, dtype_name
from sglang_conformance.env import BodyEnv, DeviceEnv
from sglang_conformance.tolerance import Error, compare_exact, compare_floats, compare_integers
from sglang_core.backend.claims import Support
from sglang_core.backend.interface import Backend, DeviceInfo, KernelContext, RuntimeContext
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.providers import Providers, collect_kernels
from sglang_core.backend.selection import REFERENCE, OpTable
from sglang_core.errors import KernelSelectionError
from sglang_core.ops import OPS


class Verdict(enum.Enum):
    PASS = "PASS"  # claimed, a kernel ran, and it is right
    FAIL = "FAIL"  # wrong, an error, or a refusal of what is claimed
    REFERENCE = "REFERENCE"  # not claimed: the body ran, and it is right
    NOT_CLAIMED = "NOT_CLAIMED"  # a kernel ran and is right, and nothing claims it
    REFUSED = "REFUSED"  # of a profile that is not stated, and refused
    UNSUPPORTED = "UNSUPPORTED"  # declared so; not run


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of one case in one dtype."""

    op: str
    title: str
    dtype: str
    profile: str
    verdict: Verdict
    provider: str = ""
    reason: str = ""
    errors: dict[str, Error] = field(default_factory=dict)


class Suite:
    """One device, opened, with its kernels and claims."""

    def __init__(
        self,
        backend: Backend,
        info: DeviceInfo,
        *,
        seed: int = 0,
        num_threads: int | None = None,
        kernels: Sequence[Kernel] | None = None,
    ) -> None:
        """`kernels` are the backend's and every installed provider's unless given. `num_threads` is for host devices."""
        ctx = KernelContext(device=info)
        self.backend, self.info, self.seed = backend, info, seed
        self.claims = backend.claims(ctx)
        self._kernels = collect_kernels(backend, ctx, Providers()) if kernels is None else list(kernels)
        self._runtime = backend.create_runtime(RuntimeContext(devices=(info,), num_threads=num_threads))

    def close(self) -> None:
        self._runtime.close()

    def run(self, select: Iterable[str] = ()) -> Iterator[Result]:
        """Every case whose title contains one of `select` (or every case), in every dtype it has."""
        wanted = list(select)
        for case in all_cases():
            for dtype in case.dtypes:
                if not wanted or any(text in case.title(dtype) for text in wanted):
                    yield self.judge(case, dtype)

    def untested_claims(self) -> list[str]:
        """Ops that are claimed natively and that no case exercises."""
        tested = {op for case in all_cases() for op in (case.op, *case.covers)}
        claimed = {c.op for c in self.claims.claims if c.support is Support.NATIVE}
        return sorted((set(OPS) if "*" in claimed else claimed) - tested)

    def judge(self, case: Case, dtype: torch.dtype) -> Result:
        """Run one case three ways and compare."""
        support = self.claims.support(case.op, fmt=case.fmt, dtype=dtype_name(dtype))
        if support is Support.UNSUPPORTED:
            return self._result(case, dtype, Verdict.UNSUPPORTED, reason="declared unsupported")
        seed = self.seed + zlib.crc32(f"{case.op}[{case.name}]".encode())
        env: DeviceEnv | None = None
        try:
            env = DeviceEnv(dtype, seed, self._runtime, self._table)
            with torch.inference_mode():
                outputs = case.run(env)
                self._runtime.synchronize()
                outputs = {name: x.cpu() for name, x in outputs.items()}
        except KernelSelectionError as e:
            held = case.profile == "core" or case.profile in self.claims.profiles
            return self._result(case, dtype, Verdict.FAIL if held else Verdict.REFUSED, reason=str(e))
        except Exception as e:  # a kernel may raise anything
            return self._result(case, dtype, Verdict.FAIL, _provider(env, case), f"{type(e).__name__}: {e}")
        errors, wrong = _compare(case, dtype, seed, outputs)
        provider = _provider(env, case)
        if wrong:
            return self._result(case, dtype, Verdict.FAIL, provider, "; ".join(wrong), errors)
        verdict = Verdict.REFERENCE if provider == REFERENCE else Verdict.NOT_CLAIMED
        if support is Support.NATIVE:
            verdict = Verdict.PASS
        return self._result(case, dtype, verdict, provider, errors=errors)

    def _table(self, page_size: int) -> OpTable:
        return OpTable(
            self.info,
            self.backend,
            ops=OPS,
            kernels=self._kernels,
            claims=self.claims,
            fallback="error",
            page_size=page_size,
        )

    def _result(
        self,
        case: Case,
        dtype: torch.dtype,
        verdict: Verdict,
        provider: str = "",
        reason: str = "",
        errors: dict[str, Error] | None = None,
    ) -> Result:
        return Result(
            op=case.op,
            title=case.title(dtype),
            dtype=dtype_name(dtype),
            profile=case.profile,
            verdict=verdict,
            provider=provider,
            reason=reason,
            errors=errors or {},
        )


def _provider(env: DeviceEnv | None, case: Case) -> str:
    return env.bound[case.op].provider if env is not None and case.op in env.bound else ""


def _compare(case: Case, dtype: torch.dtype, seed: int, outputs: Outputs) -> tuple[dict[str, Error], list[str]]:
    """The error of each output, and what is wrong with those that are."""
    with torch.inference_mode(), _one_thread():
        body, oracle = case.run(BodyEnv(dtype, seed)), case.run(BodyEnv(dtype, seed, oracle=True))
    errors: dict[str, Error] = {}
    wrong: list[str | None] = []
    for name, x in outputs.items():
        if name in case.exact:
            wrong.append(compare_exact(name, x, body[name]))
        elif _is_float(x, body[name]):
            errors[name], message = compare_floats(name, x, body[name], oracle[name].double(), dtype)
            wrong.append(message)
        else:
            wrong.append(compare_integers(name, x, oracle[name], case.mismatch))
    return errors, [message for message in wrong if message is not None]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small ops gain nothing from more, and lose much where other processes hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_float(x: Tensor, body: Tensor) -> bool:
    return x.is_floating_point() or body.is_floating_point()
