"""What Gluon's words for Hopper and Blackwell mean, on a host: `sglang_triton.hopper_*kernels` and `blackwell_*kernels` run as they are written, program by program.

Triton's interpreter knows no Gluon. Here the partitions of a program are threads of which one runs at a time, chosen at random at each operation that
another can see, some more often than others. Copies by TMA arrive late and in any order, and what they will overwrite is NaN from the start; products read shared memory when they end,
which is somewhere between their issue and the wait for them; so do copies from shared memory. What a product
writes to tensor memory reads as NaN until it ends, and only then its barriers hear of it. So a barrier that is missing, waited for in the wrong phase or freed too early shows
in results, or as a deadlock. Layouts are not modelled: the compiler checks these.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.jit import ConstexprFunction

BARRIERS = torch.int64  # what barriers are allocated as


class Deadlock(AssertionError):
    """Every partition waits, and nothing is under way."""


class Unordered(AssertionError):
    """A product or a copy reads what was written without a fence in between, or what is gone as its program has ended."""


class _Stopped(BaseException):
    """Another partition failed."""


class Machine:
    """Turns of one program's partitions, and what is under way meanwhile."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.pace = self.random.random() ** 3  # of copies and products
        self.newest_first = self.random.random() < 0.5
        self.copies: list[Callable[[], None]] = []
        self.partitions: list[_Partition] = []
        self.error: BaseException | None = None

    def run(self, functions: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """All partitions, to their ends. Raises what the first of them to fail raised."""
        self.partitions = [_Partition(lambda f=f, a=a: f(*a), 1e-3 + self.random.random() ** 4) for f, a in functions]
        for partition in self.partitions:
            partition.thread = threading.Thread(target=self._body, args=(partition,))
            partition.thread.start()
        self._hand_over()
        for partition in self.partitions:
            partition.thread.join()
        if self.error is not None:
            raise self.error
        if any(partition.stores or partition.products for partition in self.partitions):
            raise Unordered

    @property
    def current(self) -> _Partition:
        return next(p for p in self.partitions if p.thread is threading.current_thread())

    def turn(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let others run, at least until it is `ready`; meanwhile copies arrive and products end."""
        me = self.current
        me.ready = ready
        while True:
            if self.copies and self.random.random() < self.pace:
                self._end_copy()
            busy = [p for p in self.partitions if p.products]
            if busy and self.random.random() < self.pace:
                self.random.choice(busy).end_product()
            self._hand_over()
            me.turn.acquire()
            if self.error is not None:
                raise _Stopped
            if ready():
                return

    def _hand_over(self) -> None:
        alive = [p for p in self.partitions if not p.ended]
        while alive and not any(p.ready() for p in alive) and self.error is None:
            if self.copies:
                self._end_copy()
            elif busy := [p for p in self.partitions if p.products]:
                self.random.choice(busy).end_product()
            else:
                self.error = Deadlock(f"{len(alive)} partitions wait for each other")
                break
        if self.error is not None:
            for p in alive:
                p.turn.release()
        elif alive:
            able = [p for p in alive if p.ready()]
            self.random.choices(able, [p.speed for p in able])[0].turn.release()

    def _end_copy(self) -> None:
        self.copies.pop(-1 if self.newest_first else self.random.randrange(len(self.copies)))()

    def _body(self, partition: _Partition) -> None:
        partition.turn.acquire()
        try:
            if self.error is None:
                partition.function()
        except _Stopped:
            pass
        except BaseException as error:
            self.error = self.error or error
        partition.ended = True
        self._hand_over()


@dataclass(eq=False)
class _Partition:
    function: Callable[[], None]
    speed: float
    thread: threading.Thread = field(default_factory=threading.Thread)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ready: Callable[[], bool] = lambda: True
    ended: bool = False
    products: list[Product | TensorProduct | Commit] = field(default_factory=list)  # under way, in order
    stores: int = 0  # copies from shared memory that still read it

    def end_product(self) -> None:
        self.products.pop(0).end()


class Barrier:
    """An mbarrier: a phase ends with its last arrival and its last byte."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine, self.number = machine, number
        self.count = self.left = self.nbytes = self.phase = 0

    def start(self, count: int) -> None:
        self.count = self.left = count

    def arrive(self, count: int = 1, nbytes: int = 0) -> None:
        assert self.left >= count, "more arrivals than the barrier counts"
        self.left, self.nbytes = self.left - count, self.nbytes + nbytes
        self._settle()

    def land(self, nbytes: int) -> None:
        self.nbytes -= nbytes
        self._settle()

    def _settle(self) -> None:
        if self.left == 0 and self.nbytes == 0:
            self.phase, self.left = self.phase + 1, self.count


class Shared:
    """A part of shared memory. It holds NaN until it is written."""

    def __init__(self, data: Tensor, fenced: list[bool]) -> None:
        self.data, self.dtype, self.fenced = data, data.dtype, fenced

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)], self.fenced)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.data[start : start + length], self.fenced)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order), self.fenced)

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, x: Tensor) -> None:
        assert x.dtype == self.dtype
        self.data.copy_(x)
        self.fenced[0] = False


@dataclass(eq=False)
class Product:
    """acc + a b, under way. It may be looked at once it was waited for."""

    a: Tensor | Shared
    b: Shared
    acc: Any
    use_acc: bool
    value: Tensor | None = None

    def end(self) -> None:
        a, b = (x.data if isinstance(x, Shared) else x for x in (self.a, self.b))
        if not all(x.fenced[0] for x in (self.a, self.b) if isinstance(x, Shared)):
            raise Unordered
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        y = a.float() @ b.float()
        self.value = acc + y if self.use_acc else y


class TensorMemory:
    """A part of tensor memory. It holds NaN until it is written; `under_way`: products that will write to some part of `whole`."""

    def __init__(self, whole: Tensor, data: Tensor, under_way: list[TensorProduct]) -> None:
        self.whole, self.data, self.dtype, self.under_way = whole, data, data.dtype, under_way

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def index(self, i: Any) -> TensorMemory:
        return TensorMemory(self.whole, self.data[int(i)], self.under_way)

    def slice(self, start: int, length: int) -> TensorMemory:
        return TensorMemory(self.whole, self.data[..., start : start + length], self.under_way)

    def load(self, layout: object) -> Tensor:
        before = self.whole.clone()
        for product in self.under_way:
            product.acc.data.fill_(float("nan"))
        made = self.data.clone()
        self.whole.copy_(before)
        return made

    def store(self, x: Tensor) -> None:
        assert x.dtype == self.dtype
        self.data.copy_(x)


def _reinterpret(memory: TensorMemory, dtype: torch.dtype, shape: list[int], layout: object) -> TensorMemory:
    made = memory.data.view(dtype)
    assert list(made.shape) == shape
    return TensorMemory(memory.whole, made, memory.under_way)


@dataclass(eq=False)
class TensorProduct:
    """acc + a b into tensor memory, under way."""

    a: Shared | TensorMemory
    b: Shared
    acc: TensorMemory
    use_acc: bool

    def end(self) -> None:
        if not all(x.fenced[0] for x in (self.a, self.b) if isinstance(x, Shared)):
            raise Unordered
        y = self.a.data.float() @ self.b.data.float()
        self.acc.data.copy_(self.acc.data + y if self.use_acc else y)
        self.acc.under_way.remove(self)


@dataclass(eq=False)
class Commit:
    """Stands behind the products that its barrier is to hear of the end of."""

    barrier: Barrier

    def end(self) -> None:
        self.barrier.arrive()


@dataclass(frozen=True)
class Pointer:
    """Into a tensor, at one offset or at many."""

    data: Tensor
    offset: Any = 0

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.data, self.offset + more)


@dataclass(frozen=True)
class Box:
    """A descriptor: what TMA copies boxes of. Outside there are zeros."""

    data: Tensor
    shape: tuple[int, ...]
    layout: None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def read(self, at: list[int]) -> Tensor:
        row, column = at
        made = torch.zeros(self.shape, dtype=self.dtype)
        part = self.data[max(row, 0) : row + self.shape[0], column : column + self.shape[1]]
        made[max(-row, 0) :][: part.shape[0], : part.shape[1]] = part
        return made

    def write(self, at: list[int], x: Tensor) -> None:
        row, column = at
        part = self.data[row : row + self.shape[0], column : column + self.shape[1]]
        part.copy_(x[: part.shape[0], : part.shape[1]])


class Kernel:
    """A kernel to be launched as Triton's are: `kernel[grid](*args, **constexprs)`.

    `deaf`: the number of an allocation of barriers that waits do not wait for. `fences`: whether fences are seen.
    """

    def __init__(
        self, module: Any, kernel: Any, *, seed: int = 0, deaf: int | None = None, fences: bool = True
    ) -> None:
        self.module, self.kernel, self.seed, self.deaf, self.fences = module, kernel, seed, deaf, fences

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, **more: self._launch(grid[0], args, more)

    def _launch(self, programs: int, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        del more["num_warps"]
        given = [
            Pointer(_memory(x)) if isinstance(x, Tensor)
            else Box(x.base, tuple(x.block_shape)) if hasattr(x, "block_shape") else x
            for x in args
        ]  # fmt: skip
        for program in range(programs):
            machine = Machine(hash((self.seed, program)))
            names = _names(self.module, _Words(machine, program, programs, self.deaf, self.fences))
            names[self.kernel.fn.__name__](*given, **more)


def _names(module: Any, words: _Words) -> dict[str, Any]:
    """The module's names with ours in the place of Gluon's; functions of other modules see theirs."""
    made: dict[int, dict[str, Any]] = {}

    def seen_from(found: dict[str, Any]) -> dict[str, Any]:
        if id(found) in made:
            return made[id(found)]
        names = made[id(found)] = dict(found)
        for name, value in found.items():
            if isinstance(value, GluonJITFunction):
                names[name] = FunctionType(value.fn.__code__, seen_from(value.fn.__globals__), name)
            elif isinstance(value, gl.constexpr):
                names[name] = value.value
            elif isinstance(value, ConstexprFunction):  # it makes a layout
                names[name] = lambda *args: None
        names |= words.names
        return names

    return seen_from(vars(module))


class _Words:
    """Gluon's functions as one program sees them."""

    def __init__(self, machine: Machine, program: int, programs: int, deaf: int | None, fences: bool) -> None:
        self.machine, self.deaf, self.fences = machine, deaf, fences
        self.allocated, self.memory = 0, list[list[bool]]()
        none = lambda *args: None  # noqa: E731  layouts
        language = SimpleNamespace(
            bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32, int32=torch.int32, int64=BARRIERS, constexpr=gl.constexpr,
            program_id=lambda axis: program, num_programs=lambda axis: programs, static_range=range, cdiv=lambda a, b: -(-a // b),
            arange=lambda low, high, layout: torch.arange(low, high, dtype=torch.int32),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, x, dtype, layout: torch.full(shape, x, dtype=dtype),
            zeros_like=torch.zeros_like, where=torch.where, exp2=torch.exp2, log2=torch.log2,
            max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis), convert_layout=lambda x, layout: x,
            maximum=lambda a, b: torch.maximum(*map(torch.as_tensor, (a, b))),
            minimum=lambda a, b: torch.minimum(*map(torch.as_tensor, (a, b))),
            SliceLayout=none, DotOperandLayout=none, load=_load, store=_store,
            allocate_shared_memory=self.allocate, warp_specialize=lambda parts, warps, registers: machine.run(parts),
        )  # fmt: skip
        barriers = SimpleNamespace(
            MBarrierLayout=none, init=lambda barrier, count: barrier.start(count), wait=self.wait,
            arrive=lambda barrier, count: self.seen(lambda: barrier.arrive(count)),
            expect=lambda barrier, nbytes: self.seen(lambda: barrier.arrive(1, nbytes)),
        )  # fmt: skip
        self.names = {
            "gl": language,
            "mbarrier": barriers,
            "async_load": self.copy,
            "async_store": self.copy_out,
            "store_wait": self.wait_for_stores,
            "fence_async_shared": self.fence,
            "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.wait_for_products,
            "allocate_tensor_memory": self.allocate_tensors,
            "tcgen05_mma": self.multiply_into,
            "tcgen05_commit": self.commit,
            "reinterpret": _reinterpret,
        }

    def seen(self, act: Callable[[], None]) -> None:
        self.machine.turn()
        act()

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: object) -> Any:
        if dtype == BARRIERS:
            self.allocated += 1
            made = [Barrier(self.machine, self.allocated) for _ in range(shape[0])]
            return SimpleNamespace(index=lambda i: made[int(i)]) if len(shape) > 1 else made[0]
        self.memory.append([True])
        return Shared(torch.full(shape, float("nan"), dtype=dtype), self.memory[-1])

    def allocate_tensors(self, dtype: torch.dtype, shape: list[int], layout: object) -> TensorMemory:
        whole = torch.full(shape, float("nan"), dtype=dtype)
        return TensorMemory(whole, whole, [])

    def wait(self, barrier: Barrier, phase: Any) -> None:
        if barrier.number != self.deaf:
            self.machine.turn(lambda: barrier.phase % 2 != int(phase))

    def copy(self, box: Box, at: list[Any], barrier: Barrier, result: Shared) -> None:
        where = [int(x) for x in at]
        self.machine.turn()
        result.data.fill_(float("nan"))

        def land() -> None:
            result.data.copy_(box.read(where))
            barrier.land(result.data.nbytes)

        self.machine.copies.append(land)

    def copy_out(self, box: Box, at: list[Any], source: Shared) -> None:
        where, mine = [int(x) for x in at], self.machine.current
        mine.stores += 1

        def land() -> None:
            box.write(where, source.data)
            mine.stores -= 1

        if not source.fenced[0]:
            raise Unordered
        self.machine.copies.append(land)
        self.machine.turn()

    def wait_for_stores(self, outstanding: int) -> None:
        mine = self.machine.current
        self.machine.turn(lambda: mine.stores <= outstanding)

    def fence(self) -> None:
        for fenced in self.memory:
            fenced[0] = fenced[0] or self.fences

    def multiply(self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool) -> Product:
        assert is_async
        self.machine.turn()
        made = Product(a, b, acc, use_acc)
        self.machine.current.products.append(made)
        return made

    def multiply_into(self, a: Any, b: Shared, acc: TensorMemory, *, use_acc: Any = True) -> None:
        self.machine.turn()
        made = TensorProduct(a, b, acc, bool(use_acc))
        self.machine.current.products.append(made)
        acc.under_way.append(made)

    def commit(self, barrier: Barrier) -> None:
        self.machine.turn()
        self.machine.current.products.append(Commit(barrier))

    def wait_for_products(self, outstanding: int, deps: list[Any]) -> Any:
        mine = self.machine.current
        self.machine.turn()
        while len(mine.products) > outstanding:
            mine.end_product()
        values = [x.value if isinstance(x, Product) else x for x in deps]
        assert all(value is not None for value in values), "looked at before its end"
        return values[0] if len(values) == 1 else tuple(values)


def _memory(x: Tensor) -> Tensor:
    """From x's first element on, to the end of what it is a view of."""
    return x.as_strided((x.untyped_storage().nbytes() // x.itemsize - x.storage_offset(),), (1,))


def _load(pointer: Pointer, mask: Any = True, other: float = 0) -> Tensor:
    where = torch.as_tensor(pointer.offset)
    mask = torch.as_tensor(mask).expand(where.shape)
    made = torch.full(where.shape, other, dtype=pointer.data.dtype)
    made[mask] = pointer.data[where[mask].long()]
    return made


def _store(pointer: Pointer, value: Tensor, mask: Tensor) -> None:
    where = torch.as_tensor(pointer.offset).expand(value.shape)
    mask = mask.expand(value.shape)
    assert value.dtype == pointer.data.dtype
    pointer.data[where[mask].long()] = value[mask]


@contextmanager
def launched(launcher: Any, name: str, kernel: Kernel) -> Iterator[None]:
    """Inside, the module `launcher` launches `kernel` by `name`."""
    old = getattr(launcher, name)
    setattr(launcher, name, kernel)
    try:
        yield
    finally:
        setattr(launcher, name, old)
