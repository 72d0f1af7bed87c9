"""`EngineEnv`: where a case of the engine runs. The same seed gives the same weights and prompts in each."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from sglang_conformance.e2e.checkpoint import TinyModel
from sglang_conformance.e2e.engine import Answer, Engine, Kind
from sglang_core.backend.cpu import CpuBackend
from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.selection import ExplainRow

NUM_NEW = 6


class EngineEnv:
    """Engines of one model in one dtype, on one device. Each kind is built once, and serves all cases until `close`."""

    def __init__(
        self,
        model: TinyModel,
        device: ChosenDevice,
        *,
        dtype: torch.dtype,
        seed: int,
        num_threads: int | None = None,
        computes_in: torch.dtype | None = None,
        unit: int | None = None,
    ) -> None:
        """`computes_in` is the dtype of the engines, where it is not that of the weights; `unit` as of `Engine`."""
        self.model, self.dtype = model, dtype
        self._device, self._seed, self._num_threads = device, seed, num_threads
        self._computes_in, self._unit = computes_in or dtype, unit
        self._engines: dict[Kind, Engine] = {}
        self._cold: list[Answer] = []

    def engine(self, kind: Kind = "whole") -> Engine:
        """With no prefix cached. One that failed is built again."""
        engine = self._engines.get(kind)
        if engine is None or engine.broken or engine.has_work:
            self._engines[kind] = engine = Engine(
                self.model,
                self._device,
                kind,
                dtype=self._computes_in,
                weights=self.dtype,
                seed=self._seed,
                num_threads=self._num_threads,
                unit=self._unit,
            )
        engine.flush()
        return engine

    def cold(self) -> list[Answer]:
        """`prompts()` and their answers of NUM_NEW tokens: one after the other, nothing cached, each prompt in one step."""
        if not self._cold:
            self._cold = self.engine().answers(self.prompts(), NUM_NEW)
            assert all(answer.num_cached == 0 for answer in self._cold), "the prompts have nothing in common"
        return self._cold

    def prompts(self, lengths: Sequence[int] = ()) -> list[list[int]]:
        """Prompts that have nothing in common: within a page, past its end, past the second, whole pages, just less than some."""
        u = self.engine().unit
        lengths = lengths or [3, u + 1, 2 * u + 3, 3 * u, 4 * u - 3]
        generator = torch.Generator().manual_seed(self._seed)
        return [self.model.text(generator, length) for length in lengths]

    @property
    def explained(self) -> list[ExplainRow]:
        """Which kernel each op of the model got; none where no engine was built."""
        return next((engine.explained for engine in self._engines.values()), [])

    def close(self) -> None:
        for engine in self._engines.values():
            with suppress(Exception):  # of a device that failed before
                engine.close()
        self._engines.clear()


def bodies(
    model: TinyModel, dtype: torch.dtype, seed: int, *, oracle: bool = False, unit: int | None = None
) -> EngineEnv:
    """The op bodies on the host; or, as the oracle, in float32 with weights that are rounded to `dtype`.

    `unit`: the device's that they are compared with, whose pages may be larger, so that both are asked the same.
    """
    backend = CpuBackend()
    device = ChosenDevice(backend=backend, info=backend.probe()[0], reason="the reference")
    computes_in = torch.float32 if oracle else None
    return EngineEnv(model, device, dtype=dtype, seed=seed, num_threads=1, computes_in=computes_in, unit=unit)


class EngineEnvs:
    """The envs of one device. Those of a model serve all its cases, and go when another model's come."""

    def __init__(self, device: ChosenDevice, *, seed: int, num_threads: int | None) -> None:
        self._device, self._seed, self._num_threads = device, seed, num_threads
        self._envs: dict[torch.dtype, EngineEnv] = {}

    def get(self, model: TinyModel, dtype: torch.dtype) -> EngineEnv:
        if any(env.model is not model for env in self._envs.values()):
            self.close()
        if dtype not in self._envs:
            self._envs[dtype] = EngineEnv(
                model, self._device, dtype=dtype, seed=self._seed, num_threads=self._num_threads
            )
        return self._envs[dtype]

    def close(self) -> None:
        for env in self._envs.values():
            env.close()
        self._envs.clear()
