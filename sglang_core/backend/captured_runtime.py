"""`CapturedRuntime`: a device with streams of its own, which captures the launches of short steps and replays them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar, Generic, TypeVar

import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sglang_core.backend.captured_driver import DeviceDriver, DeviceGraph
from sglang_core.backend.captured_step import CapturedSteps
from sglang_core.backend.communicator import Communicator, FlatCommunicator, LocalCommunicator
from sglang_core.backend.device_stream import DeviceStream
from sglang_core.backend.interface import Bucket, MemoryInfo, RuntimeContext, Stream
from sglang_core.backend.tensor_tree import map_tensors
from sglang_core.backend.torch_runtime import TorchRuntime
from sglang_core.backend.transfers import one_transfer, to_pinned

D = TypeVar("D", bound=DeviceDriver)

FEW_REQS = 16  # a step with prefill has seldom more: page tables and logits of so many are small


class CapturedRuntime(TorchRuntime, Generic[D]):
    """Decode steps and, where `captures_prefills`, short steps with prefills are padded to buckets and replayed as graphs; others run in
    their own shapes, kernel by kernel.

    Where every op is watched (`ctx.watched`) there are no buckets and no graphs: a replay calls no op.
    """

    takes_exact_shapes = True
    collectives: ClassVar[str]  # the backend of torch.distributed
    most_captured_reqs: ClassVar[int]  # in a longer step the kernels outlast the host's launching of them

    def __init__(self, ctx: RuntimeContext, driver: D) -> None:
        driver.bind()
        super().__init__(ctx, driver.device)
        self.driver = driver

    @abstractmethod
    def batch_sizes(self, largest: int) -> list[int]:
        """Numbers of reqs that a decode step is padded to, ascending, the last of them `largest`."""

    def token_sizes(self, largest: int) -> list[int]:
        """Numbers of tokens that a step with a prefill is padded to, ascending, the last of them `largest`; asked where `captures_prefills`."""
        raise NotImplementedError

    def group_options(self) -> dict[str, Any]:
        """What `init_process_group` is told beside ranks and time."""
        return {}

    def capture(self, fn: Callable[[], Any]) -> tuple[DeviceGraph, Any]:
        return self.driver.capture(fn)

    def memory(self) -> MemoryInfo:
        free, total = self.driver.memory()
        return MemoryInfo(total=total, free=free)

    def num_allocations(self) -> int | None:
        return self.driver.num_allocations()

    def synchronize(self) -> None:
        self.driver.synchronize()

    def stream(self) -> Stream:
        return DeviceStream(self.driver)

    def buckets(self, *, max_num_tokens: int, max_num_reqs: int, max_num_pages: int) -> Sequence[Bucket]:
        """The largest first: graphs share their memory, and what the first one takes is enough for all but a little.

        Steps with prefills are of any lengths that add up, decoding reqs among them; each size in two forms, for few reqs and for as many
        as there may be. Both numbers of reqs are those of decode steps, so that they share the graphs of sampling.
        """
        if self.ctx.watched:
            return ()
        num_reqs = self.batch_sizes(min(max_num_reqs, self.most_captured_reqs))
        shapes = [(size, size, 1) for size in num_reqs]
        if self.captures_prefills and self.ctx.prefill_graph_tokens:
            for tokens in self.token_sizes(min(self.ctx.prefill_graph_tokens, max_num_tokens)):
                forms = {
                    next((n for n in num_reqs if n >= most), num_reqs[-1]) for most in (min(tokens, FEW_REQS), tokens)
                }
                shapes += [(tokens, reqs, tokens) for reqs in forms]
        return [
            Bucket(num_tokens=tokens, num_reqs=reqs, max_extend=longest, num_pages=max_num_pages)
            for tokens, reqs, longest in sorted(shapes, reverse=True)
        ]

    def compile_step(self, fn: Callable[..., Any], state: Any, buckets: Sequence[Bucket]) -> Callable[..., Any]:
        if not buckets:
            return super().compile_step(fn, state, buckets)
        return CapturedSteps(fn, state, self.capture, len(buckets))

    def alloc_packed(self, num_bytes: int) -> Tensor:
        return self.driver.pinned(num_bytes)

    def to_device(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        made = one_transfer(list(arrays.values()), self.torch_device, self.driver.pinned)
        return dict(zip(arrays, made, strict=True))

    def to_host(self, result: Any) -> Any:
        return map_tensors(result, lambda _, x: to_pinned(x, self.driver.pinned), "")

    def communicator(self, ranks: Sequence[int], rank: int, store: Any) -> Communicator:
        if len(ranks) == 1:
            return LocalCommunicator()
        timeout = timedelta(seconds=self.ctx.dist_timeout)
        if not dist.is_initialized():
            dist.init_process_group(
                self.collectives,
                store=store,
                rank=self.ctx.rank,
                world_size=self.ctx.world_size,
                timeout=timeout,
                **self.group_options(),
            )
        return FlatCommunicator(dist.new_group(list(ranks), timeout=timeout), ranks, rank)
