"""The two classes a device plugin writes: `Backend` (cheap, opens nothing) and `DeviceRuntime` (one opened device).

Methods take one frozen context object each, so that a new fact is a minor version. Importing this imports no torch.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sglang_core.backend.claims import Claims
from sglang_core.backend.kernel import Kernel

if TYPE_CHECKING:  # torch is heavy, and a plugin is probed without it
    import torch
    from numpy.typing import NDArray

    from sglang_core.backend.communicator import Communicator
    from sglang_core.backend.pool import Pool, PoolSpec
    from sglang_core.backend.state_pool import StatePool, StatePoolSpec

M = TypeVar("M")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceNote:
    """Something that a device can do without: is it there, and is it used? `fix`: what to do, where that is worth doing."""

    name: str  # "flashinfer"
    found: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceInfo:
    """One device that a backend's probe found.

    `path` names the device from family to model, like "cuda/sm_90": a kernel says for which path prefixes it is written.
    `score` ranks devices of all backends for `--device auto`: 0 reference, 10-99 host CPUs, 100 and up accelerators.
    `versions` are of what the device stands on and no Python package has: its driver, its firmware, its vendor's libraries.
    A conformance report without any is not whole. `notes` are for `doctor`: parts that may be missing, like libraries that are used where installed.
    """

    backend: str
    index: int = 0
    path: str
    name: str
    score: int = 0
    total_memory: int = 0  # bytes
    facts: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)  # {"driver": "580.65"}
    problem: str = ""  # why it cannot be opened and what to do, where that is known without opening it
    notes: tuple[DeviceNote, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.backend}:{self.index}"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryInfo:
    """Bytes on the device: all of it, and what is free to this process now."""

    total: int
    free: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeContext:
    """What a runtime is opened with: one device, whose process is one of `world_size`, or the mesh that one process drives alone."""

    devices: tuple[DeviceInfo, ...]  # a rank each
    rank: int = 0  # of this process
    world_size: int = 1  # processes that meet in its collectives
    share: int = 0  # which of the `num_shares` processes of the server that open the same devices, as they share a host
    num_shares: int = 1
    num_threads: int | None = None  # host threads it may compute with; None: as it sees fit
    dist_timeout: float = 600.0  # seconds a collective may take before it raises
    watched: bool = False  # every op of a step is looked at as it runs: steps must call them, where the device can
    strict_compile: bool = False  # a step of no bucket raises DeviceError, where it would be compiled now
    prefill_graph_tokens: int = (
        0  # where it captures prefills: of the longest step with a prefill that it captures; 0: none
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelContext:
    """What a backend may look at to list its kernels and claims."""

    device: DeviceInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class DefaultsContext:
    """What a backend may look at to choose its defaults."""

    device: DeviceInfo
    model: Mapping[str, Any]  # the checkpoint's config.json


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshContext:
    """What a backend may look at to say which devices one process drives."""

    device: DeviceInfo  # that was asked for
    num_ranks: int  # two or more


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """One static shape of a compiled step: T tokens, R reqs, Q longest extend, C page-table columns."""

    num_tokens: int
    num_reqs: int
    max_extend: int
    num_pages: int


class Work(Protocol):
    """Something submitted to a stream. `result` waits for it and returns what it returned, or raises what it raised."""

    def result(self, timeout: float | None = None) -> Any: ...
    def done(self) -> bool: ...


class Stream(Protocol):
    """An in-order queue of device work. What is submitted runs after all that was submitted before it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Work: ...
    def close(self) -> None: ...


class DeviceRuntime(ABC):
    """One opened device (or mesh): memory, streams, compiled steps, pools, collectives.

    `TorchRuntime` gives every method a default that holds on any device PyTorch can address.
    """

    infos: tuple[DeviceInfo, ...]
    torch_device: torch.device
    poisons_freed_pages: bool = False  # the engine then calls pool.poison on pages as they become free
    takes_exact_shapes: bool = False  # beside its buckets: what none of them holds (long prefills) is not padded
    captures_prefills: bool = False  # as many as RuntimeContext.prefill_graph_tokens says

    @abstractmethod
    def memory(self) -> MemoryInfo: ...

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def stream(self) -> Stream: ...

    @abstractmethod
    def buckets(self, *, max_num_tokens: int, max_num_reqs: int, max_num_pages: int) -> Sequence[Bucket]:
        """The shapes it compiles at start; empty for a runtime that runs exact shapes only, with no padding.

        Every step must fit one, unless `takes_exact_shapes`: then the others go to a step that was compiled for no bucket.
        """

    @abstractmethod
    def compile_step(self, fn: Callable[..., Any], state: Any, buckets: Sequence[Bucket]) -> Callable[..., Any]:
        """`fn(state, forward_batch)` ready to be called: eager, captured, or compiled. Only `state` may change in it.

        It reads the batch's tensors anew in each call. What it returns stands until the second call after it, of whichever bucket:
        the engine reads a step's result while the next one runs.
        """

    def num_allocations(self) -> int | None:
        """How often it has taken device memory so far; None where it does not count. Steps compiled at start take none."""
        return None

    def num_compiles(self) -> int | None:
        """How many step programs it has compiled so far; None where it compiles none. Those after start make reqs wait."""
        return None

    @abstractmethod
    def alloc_pool(self, spec: PoolSpec, num_pages: int) -> Pool:
        """The backend owns the bytes, the core owns the page ids."""

    @abstractmethod
    def alloc_state_pool(self, spec: StatePoolSpec, num_slots: int) -> StatePool:
        """The same for recurrent states, a slot each."""

    @abstractmethod
    def alloc_packed(self, num_bytes: int) -> torch.Tensor:
        """uint8[num_bytes] on the host, undefined: where a weight that was packed earlier is read to."""

    def to_device(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, torch.Tensor]:
        """What a step is given beside its plans, on the device for what is submitted from now on. Arrays of int32 and float32."""
        import torch

        return {name: torch.from_numpy(x).to(self.torch_device) for name, x in arrays.items()}

    def to_host(self, result: Any) -> Any:
        """A step's result as the engine reads it once its work is done; called on the stream, at the end of that work.

        A device whose copies need not be waited for begins them here; else the engine copies what it reads.
        """
        return result

    @abstractmethod
    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        """Collectives over `ranks`; `store` is a torch.distributed Store that they all reach, or None where this process drives all of
        them: then it is asked once a rank, and what it gives is called in steps alone.
        """

    def join_ranks(self, models: Iterator[M]) -> M:
        """The model that steps run, of what each rank of `infos` holds. `models` loads a rank's, an nn.Module, when it is asked for the next.

        All ranks' tensors have the same shapes, in the same order of modules; a bias of a sum is None on all but the first. A runtime of
        a mesh takes each one's tensors to their device before it asks for the next: the host then holds one rank's weights at a time.
        """
        (model,) = models
        return model

    def time_calls(self, call: Callable[[], object], *, repeats: int, replayed: bool = False) -> list[float]:
        """Seconds on the device of each of `repeats` calls, in whose caches nothing of the call before is left, where it has caches
        of its own. `call` has run before. `replayed`: it is graph safe, and may be captured once, so that what is timed is not its launch.
        """
        seconds = []
        for _ in range(repeats):
            self.synchronize()
            started = time.perf_counter()
            call()
            self.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds

    def close(self) -> None:  # noqa: B027  most devices have nothing to give back
        """Give everything back. The runtime is not used afterwards."""


class Backend(ABC):
    """One kind of device. An instance is cheap: it is made to list devices, and opens none until `create_runtime`."""

    name: str

    @abstractmethod
    def probe(self) -> list[DeviceInfo]:
        """The devices here, best first. Cheap, opens no context, never raises; empty where there are none."""

    def mesh(self, ctx: MeshContext) -> tuple[DeviceInfo, ...]:
        """The devices that one process drives, one a rank; empty where each rank is a process of its own.

        Cheap, and opens none. Raises DeviceError where it has fewer.
        """
        return ()

    def shared_by_ranks(self, info: DeviceInfo) -> bool:
        """Whether several ranks may open it, as they share a host's cores. Else each takes one of its own: the next of the same path."""
        return False

    @abstractmethod
    def create_runtime(self, ctx: RuntimeContext) -> DeviceRuntime: ...

    def kernels(self, ctx: KernelContext) -> list[Kernel]:
        """The kernels it brings. None is a valid answer: every op then runs its reference body."""
        return []

    def claims(self, ctx: KernelContext) -> Claims:
        """What conformance holds it to. Unsaid means REFERENCE."""
        return Claims()

    def config_defaults(self, ctx: DefaultsContext) -> dict[str, Any]:
        """Settings (by flat name) it prefers where the user says nothing; the core logs what they changed."""
        return {}

    def absent_reason(self) -> str:
        """Why `probe` found nothing and what to do, for the error that names this backend."""
        return "its probe found no device"
