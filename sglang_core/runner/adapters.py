"""A rank's adapters: read into host memory beside the steps, written into slots of the device between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from sglang_core.errors import WeightError
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.lora import ModelSlots
from sglang_core.types import AdapterWrite
from sglang_core.weights.adapter import Adapter, AdapterFiles, inspect_adapter, load_adapter

BURST, REST = 0.001, 4.0  # seconds that reading may take at once, and how many times as long it then rests

Written = list[tuple[int, Adapter]]


def adapter_key(name: str, version: str) -> str:
    """What an adapter is called between scheduler, cache and runner: other weights under a name are another adapter."""
    return f"{name}@{version}"


class AdapterHost:
    """The adapters that this rank has in host memory, by key. Those that are in a slot are in the slot as well."""

    def __init__(self, model: CausalLM, slots: ModelSlots) -> None:
        self._model, self._slots = model, slots
        self._adapters: dict[str, Adapter | Future[Adapter]] = {}
        self._reader = ThreadPoolExecutor(1, "adapters")

    def read(self, path: str) -> Future[tuple[AdapterFiles, Adapter]]:
        """Begin to read and check an adapter. The future raises ConfigError or WeightError for one that does not fit."""
        return self._reader.submit(self._read, path, Pace())

    def read_now(self, path: str) -> tuple[AdapterFiles, Adapter]:
        """`read`, on the caller's thread: before the first step."""
        return self._read(path, lambda: None)

    def add(self, key: str, adapter: Adapter) -> None:
        """A plan may name it from now on."""
        self._adapters[key] = adapter

    def follow(self, key: str, path: str) -> None:
        """Begin to read what rank 0 has read and found right; the first plan that names it waits for it."""
        self._adapters[key] = self._reader.submit(self._read_version, path, key.rpartition("@")[2])

    def drop(self, key: str) -> None:
        """Forget it. What a launched step writes, it holds itself."""
        self._adapters.pop(key, None)

    def taken(self, writes: Sequence[AdapterWrite]) -> Written:
        """The adapters that a plan names, held until they are written."""
        found = [(write.slot, self._adapters[write.adapter]) for write in writes]
        return [(slot, each.result() if isinstance(each, Future) else each) for slot, each in found]

    def write(self, written: Written) -> None:
        """Fill slots. On the stream, before the step that the writes came with."""
        for slot, adapter in written:
            self._slots.write(slot, adapter.pairs, adapter.others)

    def close(self) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _read(self, path: str, pace: Callable[[], None]) -> tuple[AdapterFiles, Adapter]:
        files = inspect_adapter(path, pace)
        return files, load_adapter(files, self._model, self._slots, pace)

    def _read_version(self, path: str, version: str) -> Adapter:
        files, adapter = self._read(path, Pace())
        if files.version != version:
            raise WeightError(
                f"{files.folder} changed while it was loaded: version {files.version}, and rank 0 read {version}"
            )
        return adapter


class Pace:
    """Called between small pieces of work, it rests now and then, so that a step waits for the interpreter at most a burst at a time.

    A lower priority would do the opposite: a thread that holds the interpreter and gets no core holds everybody up.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> None:
        if (busy := time.perf_counter() - self._began) > BURST:
            time.sleep(REST * busy)
            self._began = time.perf_counter()
