"""Tracing one step on a fake device: no bytes, no answers to questions about values, every write seen.

The fake device is `meta` under FakeTensorMode. Tensors from outside the step (weights, pools, inputs) become fake the first
time that an op touches them, so whatever a step closes over needs no declaration; only what it writes does.
"""

from __future__ import annotations

import functools
import gc
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglang_core.backend.tensor_tree import map_tensors
from sglang_core.errors import SglangError

FAKE = torch.device("meta")
NO_NAMES: Mapping[int, str] = {}
NO_FAKE = (
    "a compiler cannot see through it; make it a torch.library op, and register what it returns with"
    " torch.library.register_fake: empty tensors of the right shapes"
)
HOST_READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
HOST_CONSTANTS = {"tensor", "as_tensor", "asarray", "from_numpy", "new_tensor", "scalar_tensor"}
CONSTRUCTORS = {
    *("empty", "zeros", "ones", "full", "arange", "linspace", "eye", "empty_strided", "tril_indices", "triu_indices"),
    *("rand", "randn", "randint", "randperm"),
}
_TREE_FILE = map_tensors.__code__.co_filename
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class _FakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """As on a machine with a GPU: the fake device is `meta` on every machine, and no device needs to be kept from being opened.

    Where PyTorch 2.11 is built for CUDA and finds no GPU, it replaces a guard of CUDA's by one of the thread that traces first, and crashes
    when another traces after that thread has ended.
    """

    avoid_device_init = False


@dataclass(frozen=True, slots=True)
class _OpFacts:
    """What the rules look at in an op's schema."""

    random: bool
    indexes: bool
    writes: tuple[tuple[int, str], ...]  # position and name of each argument that it writes to


@functools.cache
def _op_facts(func: Any) -> _OpFacts:
    written = [(i, a.name) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    return _OpFacts(
        random=torch.Tag.nondeterministic_seeded in func.tags and "dropout" not in str(func),
        indexes=func._schema.name in INDEXING,
        writes=tuple(written),
    )


class StrictError(SglangError):
    """A step breaks a rule that some device needs. The message says which, where, and what to do instead."""


@dataclass(frozen=True, slots=True)
class Traced:
    """`read`: the outside tensors that a step touched and may not change. `kept`: its own tensors that outlived it, in words.

    `num_results`: how many tensors its ops gave; with the number of reqs it grows where something loops over them.
    """

    read: list[Tensor]
    kept: list[str]
    num_results: int


def trace_step(
    fn: Callable[..., Any],
    state: Any,
    forward_batch: Any,
    mutable: Iterable[Tensor],
    names: Mapping[int, str] = NO_NAMES,
) -> Traced:
    """Run `fn(state, forward_batch)` on the fake device. `names`: what tensors and modules (by id) are called in errors.

    Raises StrictError at the first rule broken.
    """
    device = _FakeDevice(list(mutable), names)
    try:
        with torch.no_grad(), _FakeMode(), device:
            fake_batch = map_tensors(forward_batch, device.lift, "forward_batch")
            with _PythonRules():
                fn(state, fake_batch)
    except StrictError as e:
        raise StrictError(f"{e} ({_where(e, names)})") from e
    except DataDependentOutputException as e:
        rule = "a step never reads a value on the host: no .item(), .tolist(), `if tensor`; decide with torch.where"
        raise StrictError(f"{e.func}: {rule} ({_where(e, names)})") from e
    except DynamicOutputShapeException as e:
        rule = "its output's size depends on values, and shapes are static: mask with torch.where, or plan on the host"
        raise StrictError(f"{e.func}: {rule} ({_where(e, names)})") from e
    except (UnsupportedOperatorException, NotImplementedError) as e:
        raise StrictError(f"{getattr(e, 'func', e)}: {NO_FAKE} ({_where(e, names)})") from e
    except RuntimeError as e:
        if not any(words in str(e) for words in ("data pointer", "no fake impl")):
            raise
        raise StrictError(f"{str(e).split('. ')[0]}: {NO_FAKE} ({_where(e, names)})") from e
    del fake_batch
    return Traced(read=device.touched(), kept=device.kept(), num_results=device.num_results)


class _PythonRules(TorchFunctionMode):
    """What can only be seen in Python: constructors, host reads, and the device that a tensor says it is on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" and getattr(func, "__self__", None) is Tensor.device:
            return FAKE
        if name == "data_ptr":
            raise StrictError(f"a kernel asks for the address of a tensor of the step: {NO_FAKE}")
        if name in HOST_READS:
            raise StrictError(f"Tensor.{name}: a step never reads a value on the host; decide with torch.where")
        if name in HOST_CONSTANTS:
            raise StrictError(f"torch.{name} copies a host constant in every step; make it when the model is built")
        if name == "to" and "cpu" in (*map(str, args[1:2]), str(kwargs.get("device"))):
            raise StrictError("Tensor.to('cpu') waits for the device; a step leaves its results there")
        if name in CONSTRUCTORS:
            if kwargs.get("device") is None:
                raise StrictError(f"torch.{name} without device=: it would make a host tensor; pass device=x.device")
            kwargs["device"] = FAKE
        return func(*args, **kwargs)


class _FakeDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes outside tensors fake as ops touch them, and checks what each op writes."""

    def __init__(self, mutable: list[Tensor], names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mutable, self._names = mutable, names
        self._made: list[tuple[weakref.ref[Tensor], str]] = []  # what the step's ops gave, and which they were
        self._declared = {t.untyped_storage().data_ptr() for t in mutable}
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}  # id of an outside tensor -> (it, its fake)
        self._owner: dict[int, tuple[str, Tensor, Tensor]] = {}  # fake storage -> (name, outside tensor, its fake)

    def lift(self, name: str, t: Tensor) -> Tensor:
        """The fake of an outside tensor."""
        if isinstance(t, FakeTensor):
            return t
        if t.device.type == "meta":
            raise StrictError("a constant was made inside the step; make it when the model is built")
        if id(t) not in self._fakes:
            fake = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=FAKE)
            self._fakes[id(t)] = (t, fake)
            self._owner[_storage(fake)] = (name, t, fake)
        return self._fakes[id(t)][1]

    def touched(self) -> list[Tensor]:
        return [t for t, _ in self._fakes.values() if not any(t is m for m in self._mutable)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        facts = _op_facts(func)
        if facts.random:
            raise StrictError(f"{func} draws from a stateful generator; key random numbers by (seed, position)")
        args = [self._lift_any(x) for x in args]
        kwargs = {name: self._lift_any(x) for name, x in (kwargs or {}).items()}
        if facts.indexes and any(_is_mask(t) for t in args[1]):
            raise StrictError(f"{func} with a boolean mask: its size depends on values; use torch.where")
        for position, name in facts.writes:
            written = args[position] if position < len(args) else kwargs.get(name)
            for t in written if isinstance(written, list) else [written]:
                self._check_write(func, t)
        out = func(*args, **kwargs)
        self._made += [(weakref.ref(t), str(func)) for t in tree_leaves(out) if isinstance(t, Tensor)]
        return out

    @property
    def num_results(self) -> int:
        return len(self._made)

    def kept(self) -> list[str]:
        """Tensors that the step made and that somebody still holds."""
        self._owner.clear()
        ours = {id(fake) for _, fake in self._fakes.values()}
        if any(ref() is not None and id(ref()) not in ours for ref, _ in self._made):
            gc.collect()  # what is held by a cycle only is nobody's
        left = [(ref(), func) for ref, func in self._made]
        return [
            f"the result of {func}, {t.dtype} {list(t.shape)}"
            for t, func in left
            if t is not None and id(t) not in ours
        ]

    def _lift_any(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [self._lift_any(y) for y in x]
        if not isinstance(x, Tensor) or isinstance(x, FakeTensor):
            return x
        return self.lift(self._names.get(id(x), "a weight or constant"), x)

    def _check_write(self, func: Any, t: Any) -> None:
        if not isinstance(t, Tensor) or _storage(t) not in self._owner:
            return  # made inside the step
        name, outside, fake = self._owner[_storage(t)]
        title = f"{func} writes to {name} ({outside.dtype} {list(outside.shape)})"
        if outside.untyped_storage().data_ptr() not in self._declared:
            raise StrictError(
                f"{title}, which `state` does not declare; only state.mutable_tensors() may change in a step"
            )
        if t is not fake or not any(outside is m for m in self._mutable):
            raise StrictError(
                f"{title} through a view of it; a functional compiler loses that write: use index_put_ on the whole tensor"
            )


def _is_mask(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)


def _storage(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _where(error: BaseException, names: Mapping[int, str]) -> str:
    """The innermost function and line that are neither torch nor this check, and the layer that called it."""
    torch_dir = torch.__file__.rsplit("/", 1)[0]
    layer, at = "", "at an unknown line"
    for frame, line in traceback.walk_tb(error.__traceback__):
        code, owner = frame.f_code, frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            layer = f" in layer {names.get(id(owner), '?')} ({type(owner).__name__})"
        if not code.co_filename.startswith(torch_dir) and code.co_filename not in (__file__, _TREE_FILE):
            at = f"in {frame.f_globals.get('__name__')}.{code.co_qualname} at {code.co_filename}:{line}"
    return at.replace(" at ", f"{layer} at ", 1) if layer else at
