"""Steps recorded once and replayed: no Python, no dispatcher and no interpreter lock between two kernels (csrc/tape.cpp).

A decode step of a small model is hundreds of kernels of a tenth of a millisecond, and each streams the caches full of weights, so that
the Python before the next one starts cold: 20 us an op in place of the 3 it takes alone. As CUDA graphs do, a tape keeps what each
kernel was called with; a replay copies the step's inputs to where the recorded ones were and runs the kernels again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_core.api import leaves, map_tensors
from sglang_xeon import weights
from sglang_xeon.library import ops

logger = logging.getLogger(__name__)

RECORD_AT = 2  # a shape that comes a second time will come again
MAX_SHAPES = 32  # remembered, those used last; a graph holds a step's logits and little else
MAX_ROWS = 32  # longer steps have so much work for each kernel that Python before it is no matter
LEAST_KERNELS = 16  # a step that runs fewer in one shape does so in all, and is left alone

# Ops that do nothing but run kernels that a tape notes, with operands that are the caller's.
TAPED = {
    op.default
    for op in (
        ops.linear,
        ops.linear_coded,
        ops.attention,
        ops.latent_attention,
        ops.kv_write,
        ops.rope_write,
        ops.rms_norm,
        ops.add_rms_norm,
        ops.layer_norm,
        ops.rope,
        ops.gated,
        ops.embed,
        ops.route,
        ops.fused_experts,
    )
}


class StepGraphs:
    """`step` with graphs of the shapes that come often: called as it is, and with the same results.

    A shape is recorded at its second step, and again after a weight has been rewritten. At the third the replay is compared with the step itself, and only if they are equal
    bit for bit does it stand for later ones. Steps may be run twice: that is a rule of the core.

    `before_kernels` is called when what is left of a step is kernels, or nearly: of one that is not replayed at its beginning.
    """

    def __init__(self, step: Callable[[Any], Any], before_kernels: Callable[[], None] = lambda: None) -> None:
        self._step, self._before_kernels = step, before_kernels
        self._shapes: OrderedDict[Hashable, _Shape] = OrderedDict()
        self._arena, self._given = Arena(), Given()
        self._worth_it = True
        self._num_rewritten = weights.num_rewritten

    def __call__(self, batch: Any) -> Any:
        if not self._worth_it:
            return self._as_it_is(batch)
        if self._num_rewritten != weights.num_rewritten:  # tapes point at what weights were
            self._shapes.clear()
            self._num_rewritten = weights.num_rewritten
        facts = list(leaves(batch, ""))
        inputs = [leaf for _, leaf in facts if isinstance(leaf, Tensor)]
        if any(x.dim() and x.shape[0] > MAX_ROWS + 1 for x in inputs):  # cu_extend has one more than there are reqs
            return self._as_it_is(batch)
        shape = self._shape_of(facts)
        if shape.graph is not None and shape.trusted:
            return shape.graph.replay(inputs, self._before_kernels)
        result = shape.run(self._as_it_is, batch, inputs, self._arena, self._given)
        self._worth_it = shape.num_kernels is None or shape.num_kernels >= LEAST_KERNELS
        return result

    def _as_it_is(self, batch: Any) -> Any:
        self._before_kernels()
        return self._step(batch)

    def _shape_of(self, facts: Sequence[tuple[str, Any]]) -> _Shape:
        key = tuple((path, (x.shape, x.dtype) if isinstance(x, Tensor) else x) for path, x in facts)
        shape = self._shapes.setdefault(key, _Shape())
        self._shapes.move_to_end(key)
        if len(self._shapes) > MAX_SHAPES:
            self._shapes.popitem(last=False)
        return shape


class _Shape:
    """How far the graph of one shape is: seen some times, recorded, trusted or refused."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_kernels: int | None = None  # on tapes, once recorded
        self.graph: StepGraph | None = None
        self.trusted = self.refused = False

    def run(self, step: Callable[[Any], Any], batch: Any, inputs: list[Tensor], arena: Arena, given: Given) -> Any:
        self.num_steps += 1
        if self.refused or self.num_steps < RECORD_AT:
            return step(batch)
        if self.graph is None:
            self.graph, result = StepGraph.record(step, batch, arena, given)
            self.num_kernels = self.graph.num_kernels
            if self.graph.refusal:
                self._refuse(self.graph.refusal)
            return result
        result = step(batch)
        if _equal(result, self.graph.replay(inputs)):
            self.trusted = True
        else:
            self._refuse("its replay differs")
        return result

    def _refuse(self, why: str) -> None:
        logger.info("a kind of step is not replayed: %s", why)
        self.graph, self.refused = None, True


class StepGraph:
    """One recorded step: tapes of kernels, and between them calls of ops that no tape notes."""

    def __init__(
        self, inputs: list[Tensor], nodes: list[Tape | Call], outputs: Any, given: Given, refusal: str
    ) -> None:
        self._inputs, self._nodes, self._outputs, self._given, self.refusal = inputs, nodes, outputs, given, refusal

    @property
    def num_kernels(self) -> int:
        return sum(len(node) for node in self._nodes if isinstance(node, Tape))

    @classmethod
    def record(cls, step: Callable[[Any], Any], batch: Any, arena: Arena, given: Given) -> tuple[StepGraph, Any]:
        """Runs the step on copies of the batch's tensors, which are the graph's inputs. -> the graph, and what the step gave."""
        inputs: list[Tensor] = []

        def copied(_: str, x: Tensor) -> Tensor:
            inputs.append(x.clone(memory_format=torch.contiguous_format))
            return inputs[-1]

        own = map_tensors(batch, copied, "")
        with Recorder(arena) as recorder:
            outputs = step(own)
        graph = cls(inputs, recorder.nodes, outputs, given, recorder.refusal())
        return graph, graph._handed_out({})

    def replay(self, inputs: list[Tensor], before_kernels: Callable[[], None] = lambda: None) -> Any:
        """What the step would give for a batch of these tensors. It stands until the second replay after it."""
        with torch.inference_mode():
            torch._foreach_copy_(self._inputs, inputs)
            before_kernels()
            for node in self._nodes[:-1]:
                node.replay()
            return self._handed_out(self._nodes[-1].replay(keep=False))

    def _handed_out(self, fresh: dict[int, Tensor]) -> Any:
        """`fresh` replaces outputs, by id, that the last call has just made; the others are copied out of the graph's memory."""
        copy = self._given.next()
        return map_tensors(self._outputs, lambda path, x: fresh[id(x)] if id(x) in fresh else copy(path, x), "")


class Given:
    """Memory for what replays hand out, two sets in turn: new memory for a row of logits is cleared page by page, a percent of a step."""

    def __init__(self) -> None:
        self._sets: tuple[dict[str, Tensor], ...] = ({}, {})

    def next(self) -> Callable[[str, Tensor], Tensor]:
        """Makes copies, by the place of a tensor among the outputs, that stand until the second call after this one."""
        self._sets = self._sets[1], self._sets[0]
        return partial(_copied, self._sets[0])


def _copied(memory: dict[str, Tensor], path: str, x: Tensor) -> Tensor:
    if path not in memory or memory[path].numel() < x.nbytes:
        memory[path] = torch.empty(x.nbytes, dtype=torch.uint8)
    return memory[path][: x.nbytes].view(x.dtype).view(x.shape).copy_(x)


class Recorder(TorchDispatchMode):
    """Sees every op of a step and makes the nodes of its graph. Views are none: what they look at stays where it is."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena
        self.nodes: list[Tape | Call] = []
        self._read_back = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to be told so, torch imports its compiler, which takes seconds."""
        return False

    def refusal(self) -> str:
        """Why the step cannot be replayed, "" if it can."""
        tapes = [node for node in self.nodes if isinstance(node, Tape)]
        reasons = [tape.refusal() for tape in tapes if tape.refusal()]
        if not tapes:
            reasons.append("no kernel of it goes on a tape")
        if self._read_back:
            reasons.append("the host reads a tensor in it")
        return "; ".join(reasons)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in TAPED:
            if not self.nodes or not isinstance(self.nodes[-1], Tape):
                self.nodes.append(Tape(self._arena))
            with self.nodes[-1].recording():  # type: ignore[union-attr]
                return func(*args, **kwargs)
        made = func(*args, **kwargs)
        outputs = list(_tensors(made))
        self._read_back |= not outputs and bool(func._schema.returns)
        known = {x.untyped_storage().data_ptr() for x in (*_tensors(args), *_tensors(kwargs))}
        is_view = outputs and all(x.untyped_storage().data_ptr() in known for x in outputs)
        if func._schema.is_mutable or not is_view:
            self.nodes.append(Call(func, args, kwargs, outputs))
        return made


class Arena:
    """Memory of what tapes of one step function write, in C++."""

    def __init__(self) -> None:
        self.handle = ops.arena_new()

    def __del__(self) -> None:
        ops.arena_free(self.handle)


class Tape:
    """Kernels in the order they ran, in C++."""

    def __init__(self, arena: Arena) -> None:
        self._handle = ops.tape_new(arena.handle)

    def __del__(self) -> None:
        ops.tape_free(self._handle)

    def __len__(self) -> int:
        return ops.tape_length(self._handle)  # type: ignore[no-any-return]

    def refusal(self) -> str:
        return ops.tape_refusal(self._handle)  # type: ignore[no-any-return]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What this thread's kernels do is noted."""
        ops.tape_record(self._handle)
        try:
            yield
        finally:
            ops.tape_record(0)

    def replay(self, *, keep: bool = True) -> dict[int, Tensor]:
        ops.tape_replay(self._handle)
        return {}


class Call:
    """An op called again with the tensors it had: they are held here, so what is in them is what nodes before have put there."""

    def __init__(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        self._func, self._args, self._kwargs, self._outputs = func, args, kwargs, outputs

    def replay(self, *, keep: bool = True) -> dict[int, Tensor]:
        """With `keep`, the results go to where the recorded ones are; else they are returned, by the id of those."""
        made = list(_tensors(self._func(*self._args, **self._kwargs)))
        pairs = list(zip(self._outputs, made, strict=True))
        if not keep and not self._func._schema.is_mutable:
            return {id(old): new for old, new in pairs}
        for old, new in pairs:
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)
        return {}


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for _, leaf in leaves(tree, "") if isinstance(leaf, Tensor))


def _equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))
