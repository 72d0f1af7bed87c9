"""Which of the axes along which ops go wrong have a case, op by op: seen in what the cases call, not said by them.

python -m sglang_conformance.coverage        # the table, in Markdown; exit code 1 where one is missing
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sglang_conformance.case import FLOATS, Case, all_cases
from sglang_conformance.env import BodyEnv, Op
from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.backend.pool import Pool
from sglang_core.ops import OPS
from sglang_core.ops.attention import AttnSpec, Plan
from sglang_core.ops.mla import MLASpec
from sglang_core.ops.rope import RopeSpec
from sglang_core.ops.ssm_plan import GatedDeltaSpec, StatePlan
from sglang_core.ops.weight import PackedWeight

LONG = 8000  # tokens
TILE = 16  # elements: a width that is no multiple of them is odd


@dataclass
class Seen:
    """What the calls of one op were given, over all cases."""

    rows: set[int] = field(default_factory=set)
    dtypes: set[torch.dtype] = field(default_factory=set)
    widths: set[int] = field(default_factory=set)
    strided: bool = False
    ragged: bool = False
    padded: bool = False
    far: bool = False
    page_sizes: set[int] = field(default_factory=set)
    head_dims: set[int] = field(default_factory=set)
    groups: set[float] = field(default_factory=set)
    windows: set[int] = field(default_factory=set)
    soft_caps: set[float] = field(default_factory=set)
    sinks: bool = False
    longest: int = 0
    stored: set[str] = field(default_factory=set)
    formats: set[str] = field(default_factory=set)
    relations: set[str] = field(default_factory=set)

    def note(self, args: tuple[Any, ...]) -> None:
        """Facts of one call."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        floats = [x for x in tensors if x.is_floating_point() and x.ndim]
        if tensors and tensors[0].ndim:
            self.rows.add(tensors[0].shape[0])
        self.widths |= {x.shape[-1] for x in floats}
        self.strided |= any(x.numel() > 0 and not x.is_contiguous() for x in floats)
        for arg in args:
            self._note_fact(arg)

    def _note_fact(self, fact: Any) -> None:
        match fact:
            case AttnSpec():
                self.head_dims.add(fact.head_dim)
                self.groups.add(fact.num_heads / fact.num_kv_heads)
                self.windows |= {fact.window} - {None}  # type: ignore[arg-type]
                self.soft_caps |= {fact.soft_cap} - {None}  # type: ignore[arg-type]
                self.sinks |= fact.has_sinks
            case MLASpec():
                self.head_dims.add(fact.rank)
                self.groups.add(fact.num_heads)
            case RopeSpec():
                self.head_dims.add(fact.head_dim)
            case GatedDeltaSpec():
                self.head_dims.add(fact.k_head_dim)
                self.groups.add(fact.num_v_heads / fact.num_k_heads)
            case Plan():
                self.longest = max(self.longest, int(fact.seq_lens.max()))
                self.ragged |= len(set(fact.cu_extend.diff().tolist())) > 1
                self.padded |= fact.static.num_tokens > int(fact.cu_extend[-1])
            case StatePlan():
                self.longest = max(self.longest, int(fact.cu_extend.diff().max()))
                self.ragged |= len(set(fact.cu_extend.diff().tolist())) > 1
                self.padded |= fact.static.num_tokens > int(fact.cu_extend[-1])
            case Pool():
                self.page_sizes.add(fact.spec.page_size)
                self.stored |= {name for name, dtype in KV_DTYPES.items() if dtype == fact.spec.dtype}
            case PackedWeight():
                self.formats.add(fact.fmt)


class Recorder(BodyEnv):
    """The op bodies, and what each is given in `seen`."""

    def __init__(self, case: Case, dtype: torch.dtype, seen: dict[str, Seen]) -> None:
        super().__init__(dtype, 0)
        self._case, self._seen = case, seen
        self._of(case.op).relations.add(case.name)

    def _of(self, op: str) -> Seen:
        return self._seen.setdefault(op, Seen())

    def _watched(self, op: str, fn: Op) -> Op:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._of(op).note((*args, *kwargs.values()))
            return fn(*args, **kwargs)

        return call

    def op(self, name: str, **facts: Any) -> Op:
        self._of(name)._note_fact(facts.get("spec"))
        return self._watched(name, super().op(name, **facts))

    def paged_ops(
        self, spec: AttnSpec | MLASpec, page_size: int, rotary: RopeSpec | None = None, *, normed: bool = False
    ) -> dict[str, Op]:
        ops = super().paged_ops(spec, page_size, rotary, normed=normed)
        return {name: self._watched(name, fn) for name, fn in ops.items()}

    def state_ops(self, spec: GatedDeltaSpec) -> dict[str, Op]:
        return {name: self._watched(name, fn) for name, fn in super().state_ops(spec).items()}

    def far(self, count: int) -> int:
        self._of(self._case.op).far = True
        return super().far(count)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """`met`: whether what was seen of an op has it. `of`: the ops that it means something to, and `why_not` for all others."""

    name: str
    met: Callable[[Seen], bool]
    of: frozenset[str]
    why_not: str = ""


EVERY = frozenset(name for name, op in OPS.items() if not op.host)  # plans are tried through the ops they are made for
QUANT = frozenset({"quant.quantize", "quant.dequantize"})  # of weights, as they are loaded: no part of a step
PAGED = frozenset({"attn.paged", "attn.mla_paged", "attn.rope_paged"})
POOLED = PAGED | {"kv.write", "kv.write_mla"}
RECURRENT = frozenset({"ssm.gated_delta_rule", "ssm.causal_conv1d"})
STEP = EVERY - QUANT
WRITES = frozenset({"kv.write", "kv.write_mla"})
HEADS = frozenset({"attn.paged", "attn.ragged"})
DIMS = {64, 80, 96, 128, 192, 256}
VAST = (
    frozenset({"attn.paged", "attn.mla_paged", "kv.write", "kv.write_mla", "embed.lookup", "lora.apply", "moe.fused"})
    | RECURRENT
)


def related(text: str) -> Callable[[Seen], bool]:
    return lambda seen: any(text in name for name in seen.relations)


AXES = (
    Axis(name="no rows", met=lambda s: 0 in s.rows, of=STEP, why_not="weights, not rows of a step"),
    Axis(name="one row", met=lambda s: 1 in s.rows, of=STEP, why_not="weights, not rows of a step"),
    Axis(
        name="odd sizes",
        met=lambda s: any(n % TILE for n in s.widths),
        of=EVERY - {"quant.dequantize"},
        why_not="its groups in part are tried through gemm.linear",
    ),
    Axis(
        name="strides",
        met=lambda s: s.strided,
        of=STEP - {"embed.lookup"},
        why_not="takes nothing that may be a slice",
    ),
    Axis(name="every dtype", met=lambda s: s.dtypes >= set(FLOATS), of=EVERY),
    Axis(name="ragged", met=lambda s: s.ragged, of=PAGED | RECURRENT, why_not="knows no reqs, or has a case of its own"),
    Axis(name="padding", met=lambda s: s.padded or related("padded")(s), of=STEP - WRITES - {"embed.lookup"}, why_not="writes padding to scratch, or reads ids alone"),
    Axis(name="batch invariance", met=related("alone and together"), of=STEP - WRITES, why_not="copies, bit for bit, or is no part of a step"),
    Axis(name="page sizes", met=lambda s: s.page_sizes >= {1, 16, 64}, of=POOLED, why_not="has no pages"),
    Axis(name="pages permuted", met=related("pages permuted"), of=PAGED, why_not="reads no pages"),
    Axis(name="pages shared", met=related("pages shared"), of=PAGED, why_not="reads no pages"),
    Axis(name="KV dtypes", met=lambda s: s.stored >= set(KV_DTYPES), of=POOLED - {"attn.mla_paged"}, why_not="has no pool of keys"),
    Axis(name="GQA ratios", met=lambda s: len(s.groups) >= 3, of=HEADS | {"ssm.gated_delta_rule"}, why_not="heads share nothing in it"),
    Axis(name="head dims", met=lambda s: s.head_dims >= DIMS, of=HEADS | {"rope.apply", "attn.rope_paged"}, why_not="has no heads, or latents of one size"),
    Axis(name="windows", met=lambda s: len(s.windows) >= 2, of=HEADS, why_not="has no window"),
    Axis(name="soft caps", met=lambda s: bool(s.soft_caps), of=HEADS, why_not="has no scores, or caps them always"),
    Axis(name="sinks", met=lambda s: s.sinks, of=frozenset({"attn.paged", "attn.rope_paged"}), why_not="takes no sinks"),
    Axis(name="long contexts", met=lambda s: s.longest >= LONG or related("8191")(s), of=(PAGED | {"attn.ragged"}) - {"attn.rope_paged"}, why_not="sums over no context, or as attn.paged does"),
    Axis(name="past 2^31 elements", met=lambda s: s.far, of=VAST, why_not="no id or slot is multiplied by a width in it"),
    Axis(name="more than 65,535 rows", met=related("70000 rows"), of=frozenset({"norm.rms", "norm.rms_gated", "norm.add_rms", "norm.layer", "ssm.gates", "rope.apply", "act.gated", "embed.lookup", "gemm.linear", "gemm.linear_gated", "gemm.grouped", "moe.route", "lora.apply"}), why_not="a step has fewer rows for it, or a case is too long"),
)  # fmt: skip


def observed(cases: Iterable[Case] | None = None) -> dict[str, Seen]:
    """What the cases of the ops give them: each runs on the bodies once, in one of its dtypes."""
    seen: dict[str, Seen] = {}
    with torch.inference_mode():
        for case in all_cases() if cases is None else cases:
            if case.op not in OPS:
                continue  # of the device, or of an engine
            case.run(Recorder(case, case.dtypes[0], seen))
            seen[case.op].dtypes |= set(case.dtypes)
    return seen


def gaps(seen: dict[str, Seen]) -> list[str]:
    """Every axis that means something to an op and that no case of it has, in sentences."""
    return [f"{op}: no case of {axis.name}" for axis in AXES for op in sorted(axis.of) if not axis.met(seen[op])]


def table(seen: dict[str, Seen]) -> str:
    """A row an op, a column an axis: yes, NO, or a number of the reason below why it means nothing there."""
    reasons = list(dict.fromkeys(axis.why_not for axis in AXES if axis.of < EVERY))
    lines = ["| op | " + " | ".join(axis.name for axis in AXES) + " |", "|---" * (len(AXES) + 1) + "|"]
    for op in sorted(EVERY):
        cells = [
            ("yes" if axis.met(seen[op]) else "NO") if op in axis.of else f"{reasons.index(axis.why_not) + 1}"
            for axis in AXES
        ]
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))])


def main() -> int:
    seen = observed()
    print(table(seen))
    found = gaps(seen)
    print("\n".join(["", *found]) if found else "\nEvery axis has its case.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
