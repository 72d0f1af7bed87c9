"""`Suite`: runs cases on a device and judges them."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from functools import cached_property
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from sglang_conformance.case import Case, Outputs, all_cases, dtype_name
from sglang_conformance.e2e.case import EngineCase
from sglang_conformance.e2e.env import EngineEnvs
from sglang_conformance.e2e.judge import judge as judge_engine
from sglang_conformance.env import BodyEnv, DeviceEnv, NoRoomError
from sglang_conformance.profiles import is_held, is_of_device
from sglang_conformance.rank_host import RankHost
from sglang_conformance.result import Result as Result
from sglang_conformance.result import Verdict as Verdict
from sglang_conformance.tolerance import Error, compare_exact, compare_floats, compare_integers
from sglang_core.backend.claims import Claims, Support
from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.interface import Backend, DeviceInfo, DeviceRuntime, KernelContext, RuntimeContext
from sglang_core.backend.kernel import Kernel
from sglang_core.backend.providers import Providers, collect_kernels
from sglang_core.backend.selection import DECOMPOSED, REFERENCE, OpTable
from sglang_core.errors import ConfigError, KernelSelectionError
from sglang_core.ops import OPS

Work = tuple[Case, torch.dtype]
E = TypeVar("E", bound=DeviceEnv)


class Suite:
    """One device with its kernels and claims. It is opened by the first case that runs."""

    def __init__(
        self,
        backend: Backend,
        info: DeviceInfo,
        *,
        seed: int = 0,
        num_threads: int | None = None,
        kernels: Sequence[Kernel] | None = None,
        strict: bool = False,
        full: bool = True,
        today: date | None = None,
    ) -> None:
        """`kernels` are the backend's and every installed provider's unless given. `num_threads` is for host devices.

        `strict`: what works and is not claimed fails. `full`: long cases too. `today` is what waivers are compared with.

        Raises ConfigError under python -O.
        """
        if not __debug__:
            raise ConfigError("python -O takes away what cases assert; run the suite without it")
        ctx = KernelContext(device=info)
        self.backend, self.info, self.seed, self.strict, self.full = backend, info, seed, strict, full
        self.today = today or date.today()
        self.claims = backend.claims(ctx)
        self._kernels = collect_kernels(backend, ctx, Providers()) if kernels is None else list(kernels)
        self._num_threads = num_threads

    @cached_property
    def _runtime(self) -> DeviceRuntime:
        return self.backend.create_runtime(RuntimeContext(devices=(self.info,), num_threads=self._num_threads))

    @cached_property
    def _rank_host(self) -> RankHost:
        return RankHost(self.backend, self._num_threads, self.info)

    @cached_property
    def engines(self) -> EngineEnvs:
        device = ChosenDevice(backend=self.backend, info=self.info, reason="conformance was asked about it")
        return EngineEnvs(device, seed=self.seed, num_threads=self._num_threads)

    def close(self) -> None:
        for name in ("_runtime", "_rank_host", "engines"):
            if name in self.__dict__:
                self.__dict__[name].close()

    def select(self, texts: Iterable[str] = ()) -> list[Work]:
        """Every case whose title contains one of `texts` (or every case), in every dtype it has."""
        wanted = list(texts)
        return [
            (case, dtype)
            for case in all_cases()
            for dtype in case.dtypes
            if (self.full or not case.full) and (not wanted or any(text in case.title(dtype) for text in wanted))
        ]

    def run(self, select: Iterable[str] = ()) -> Iterator[Result]:
        """Judge what `select` selects, in this process."""
        for case, dtype in self.select(select):
            yield self.judge(case, dtype)

    def judge(self, case: Case, dtype: torch.dtype) -> Result:
        """Run one case three ways and compare; then apply what the claims and the waivers say."""
        start = time.perf_counter()
        result = judge_engine(self, case, dtype) if isinstance(case, EngineCase) else self._judged(case, dtype)
        if result.works_unclaimed and self.strict:
            result = replace(result, verdict=Verdict.FAIL, reason="works, and nothing claims it: claim it")
        return self.waive(replace(result, seconds=round(time.perf_counter() - start, 4)))

    def failed(self, case: Case, dtype: torch.dtype, reason: str) -> Result:
        """The result of a case that took its process with it."""
        return self.waive(self._result(case, dtype, Verdict.FAIL, reason=reason))

    def waive(self, result: Result) -> Result:
        """A failure that a waiver covers is WAIVED until the waiver expires."""
        waiver = next((w for w in self.claims.waivers if w.covers(result.title)), None)
        if result.verdict is not Verdict.FAIL or waiver is None:
            return result
        if waiver.expired(self.today):
            return replace(result, reason=f"the waiver {waiver.url} expired on {waiver.expires}; {result.reason}")
        reason = f"until {waiver.expires}, {waiver.url} ({waiver.reason}); {result.reason}"
        return replace(result, verdict=Verdict.WAIVED, reason=reason)

    def _judged(self, case: Case, dtype: torch.dtype) -> Result:
        of_device, held = is_of_device(case.op), is_held(case.op, self.claims.profiles)
        failed = Verdict.FAIL if held else Verdict.NOT_CLAIMED
        support = self.claims.support(case.op, fmt=case.fmt, dtype=dtype_name(dtype))
        if support is Support.UNSUPPORTED:
            return self._result(case, dtype, Verdict.NOT_CLAIMED, reason="declared unsupported; not run")
        seed = self.seed + zlib.crc32(f"{case.op}[{case.name}]".encode())
        env: DeviceEnv | None = None
        wrong: list[str] = []
        try:
            env, outputs = self._run(case, dtype, seed)
            if env.bound and self._provider(env, case) != REFERENCE:
                wrong = self._run_again(case, dtype, seed, outputs)
            outputs = {name: x.cpu() for name, x in outputs.items()}
        except KernelSelectionError as e:
            stated = case.profile == "core" or case.profile in self.claims.profiles
            return self._result(case, dtype, Verdict.FAIL if stated else Verdict.NOT_CLAIMED, reason=str(e))
        except NoRoomError as e:
            return self._result(case, dtype, Verdict.NOT_CLAIMED, env=env, reason=f"not run: {e}")
        except pytest.skip.Exception as e:
            return self._result(
                case, dtype, Verdict.FAIL, env=env, reason=f"skips itself, which counts as failing: {e}"
            )
        except AssertionError as e:  # a relation that a case checks
            return self._result(case, dtype, failed, env=env, reason=str(e) or "an assertion fails")
        except (Exception, SystemExit) as e:  # a kernel may raise anything
            return self._result(case, dtype, failed, env=env, reason=f"{type(e).__name__}: {e}")
        errors, wrong_values = _compare(case, dtype, seed, outputs)
        if wrong_values + wrong:
            return self._result(case, dtype, failed, env=env, reason="; ".join(wrong_values + wrong), errors=errors)
        verdict = Verdict.NOT_CLAIMED
        if held if of_device else support is Support.NATIVE:
            verdict = Verdict.EMULATED if self.info.facts.get("emulated") else Verdict.PASS
        elif self._provider(env, case) in (REFERENCE, DECOMPOSED):
            verdict = Verdict.REFERENCE
        result = self._result(case, dtype, verdict, env=env, errors=errors)
        return replace(result, works_unclaimed=verdict is Verdict.NOT_CLAIMED)

    def env(self, dtype: torch.dtype, seed: int, kind: type[E]) -> E:
        """The device, handed out by a `kind` of env."""
        made = kind(dtype, seed, self._runtime, self._table)
        made.rank_host = self._rank_host
        return made

    def synchronize(self) -> None:
        self._runtime.synchronize()

    def _run(self, case: Case, dtype: torch.dtype, seed: int) -> tuple[DeviceEnv, Outputs]:
        env = self.env(dtype, seed, DeviceEnv)
        with torch.inference_mode():
            outputs = case.run(env)
            self._runtime.synchronize()
        return env, outputs

    def _run_again(self, case: Case, dtype: torch.dtype, seed: int, outputs: Outputs) -> list[str]:
        """What is wrong with a kernel that is called with other numbers, and then with the first ones again."""
        before = {name: x.clone() for name, x in outputs.items()}
        self._run(case, dtype, seed + 1)
        wrong = [
            f"{name} changed when the kernel was called with other inputs: it lives in memory that is used again"
            for name, x in outputs.items()
            if compare_exact(name, x, before[name])
        ]
        again = self._run(case, dtype, seed)[1]
        different = [name for name, x in before.items() if compare_exact(name, again[name], x)]
        return wrong + [f"{name} differs when the same step runs twice" for name in different]

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

    def _provider(self, env: DeviceEnv | None, case: Case) -> str:
        if is_of_device(case.op):
            return self.backend.name
        return env.bound[case.op].provider if env is not None and case.op in env.bound else ""

    def _result(
        self, case: Case, dtype: torch.dtype, verdict: Verdict, *, env: DeviceEnv | None = None, **facts: Any
    ) -> Result:
        bound = None if env is None else env.bound.get(case.op)
        return Result(
            op=case.op,
            title=case.title(dtype),
            dtype=dtype_name(dtype),
            profile=case.profile,
            fmt=case.fmt,
            verdict=verdict,
            provider=self._provider(env, case) if verdict is not Verdict.NOT_CLAIMED or env is not None else "",
            why=bound.reason if bound else "",
            kernels=tuple(kernel.fn for kernel in bound.kernels) if bound else (),
            **facts,
        )


def untested_claims(claims: Claims) -> list[str]:
    """Ops that are claimed natively and that no case exercises."""
    tested = {op for case in all_cases() for op in (case.op, *case.covers)}
    claimed = {c.op for c in claims.claims if c.support is Support.NATIVE}
    return sorted((set(OPS) if "*" in claimed else claimed) - tested)


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
            err, message = compare_floats(name, x, body[name], oracle[name].double(), dtype)
            if math.isfinite(err.max):
                errors[name] = err
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
