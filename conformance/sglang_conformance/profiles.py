"""Profiles: what a backend may state as a whole, and what that holds it to.

A *level* (`base`, `serving`, `mla`, ...) is a list of ops that then must run natively. Without one, every op may run its body. An *option*
(`window`, `sinks`, ...) marks single cases that a kernel may refuse as long as the option is not stated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

from sglang_conformance.case import Case, Profile, dtype_name
from sglang_conformance.e2e.case import ENGINE
from sglang_conformance.e2e.models import MODELS
from sglang_conformance.result import Result, Verdict

OPTIONS = tuple(name for name in get_args(Profile) if name != "core")
# Cases of the device itself, which no op stands for. Every backend is held to the first, to the others once it states the profile.
RUNTIME, GRAPH, COMM = "runtime.", "graph.", "comm."
OF_DEVICE = {RUNTIME: None, GRAPH: "graph", COMM: "comm"}
# Of a backend that drives all ranks from one process: its collectives are parts of a step, where nothing is sent, and no rank dies alone.
MESH = "mesh"
OF_MESH = (
    *("comm.all_reduce", "comm.all_gather", "comm.reduce_scatter", "comm.all_to_all", "comm.broadcast"),
    "comm.engine",
)
QUANT = "quant:"


@dataclass(frozen=True, kw_only=True)
class Level:
    """`ops` must be native in `dtype`, where a case of them has that dtype, else in whichever their cases have.

    Without `native` they must be right, on kernels or on bodies.
    """

    name: str
    what: str
    ops: tuple[str, ...]
    fmt: str = "dense"  # what ops with weights are held to
    dtype: str = "bfloat16"
    native: bool = True


LEVELS = {
    level.name: level
    for level in (
        Level(
            name="base",
            what="memory, streams, KV and state pools, page copy, export and import; no kernels needed",
            ops=("runtime.memory", "runtime.stream", "runtime.pool", "runtime.state_pool"),
        ),
        Level(
            name="serving",
            what="every op of a dense decoder in bfloat16, natively",
            ops=(
                "attn.paged",
                "kv.write",
                "gemm.linear",
                "norm.rms",
                "norm.add_rms",
                "rope.apply",
                "act.gated",
                "embed.lookup",
                "sample.sample",
            ),
        ),
        Level(name="mla", what="latent attention", ops=("attn.mla_paged", "kv.write_mla")),
        Level(name="moe", what="routing and fused experts", ops=("moe.route", "moe.fused")),
        Level(name="vision", what="attention without a cache, layer norm", ops=("attn.ragged", "norm.layer")),
        Level(name="lora", what="adapters of many reqs in one batch", ops=("lora.apply", "lora.embed")),
        Level(name="ssm", what="recurrent layers", ops=("ssm.gated_delta_rule", "ssm.causal_conv1d")),
        Level(
            name="graph",
            what="steps compiled once and called with other inputs, in two buckets, with padding",
            ops=("graph.replay", "graph.state", "graph.memory", "graph.sampling"),
            dtype="float32",
        ),
        Level(
            name="comm",
            what="collectives over processes: right, of equal bits on all ranks, an error where a rank dies",
            ops=(
                *("comm.all_reduce", "comm.all_gather", "comm.reduce_scatter", "comm.all_to_all", "comm.broadcast"),
                *("comm.p2p", "comm.order", "comm.failure"),
            ),
            dtype="float32",
        ),
        Level(
            name="e2e",
            what="engines of whole models: answers that depend on their prompts only, and nothing left behind",
            ops=tuple(f"{ENGINE}{model.name}" for model in MODELS if not model.needs),
            native=False,
        ),
    )
}


def is_of_device(op: str) -> bool:
    return op.startswith(tuple(OF_DEVICE))


def is_held(op: str, stated: Iterable[str]) -> bool:
    """Whether a failure of `op` counts; that of an op always does."""
    profile = next((name for prefix, name in OF_DEVICE.items() if op.startswith(prefix)), None)
    return profile is None or profile in stated or (op in OF_MESH and MESH in stated)


def level_of(name: str) -> Level | None:
    """The level that a name stands for; `quant:FMT` is made of any format."""
    if name.startswith(QUANT) and len(name) > len(QUANT):
        fmt = name.removeprefix(QUANT)
        return Level(name=name, what=f"linear layers of {fmt} weights", ops=("gemm.linear",), fmt=fmt)
    return LEVELS.get(name)


def problems_of(stated: Iterable[str], cases: Sequence[Case], results: Sequence[Result]) -> list[str]:
    """What stated profiles are held to and do not keep, in sentences. `results` must be of every case in `cases`."""
    problems = []
    for name in stated:
        level = level_of(name)
        if level is None:
            if name not in OPTIONS:
                known = ", ".join((*LEVELS, f"{QUANT}FMT", *OPTIONS))
                problems.append(f"profile {name!r} is stated, and the suite has none of that name; it has {known}")
            continue
        problems += [
            f"profile {name!r} is stated, and {problem}" for problem in _problems_of_level(level, cases, results)
        ]
    return problems


def outcome(level: Level, cases: Sequence[Case], results: Sequence[Result]) -> str:
    """ "native", "emulated" or "reference" (on bodies alone) where the level would hold, stated or not; else "no"."""
    if _problems_of_level(level, cases, results):
        return "no"
    mine = {r.verdict for r in results if r.op in level.ops}
    if Verdict.EMULATED in mine:
        return "emulated"
    return "reference" if not level.native and Verdict.PASS not in mine else "native"


def _problems_of_level(level: Level, cases: Sequence[Case], results: Sequence[Result]) -> list[str]:
    problems = []
    for op in level.ops:
        dtypes = {dtype_name(d) for case in cases if case.op == op for d in case.dtypes}
        mine = [
            r
            for r in results
            if r.op == op
            and r.profile == "core"
            and r.fmt in ("*", level.fmt)
            and (level.dtype not in dtypes or r.dtype == level.dtype)
        ]
        what = op if level.fmt == "dense" else f"{op} of {level.fmt}"
        tiers = {case.full for case in cases if case.op == op}
        if not mine and tiers != {True}:  # what has long cases only is no part of the fast tier
            problems.append(f"no case of {what} ran")
        for r in mine:
            match r.verdict:
                case Verdict.REFERENCE if level.native:
                    problems.append(f"{what} runs its reference body ({r.title})")
                    break
                case Verdict.NOT_CLAIMED:
                    problems.append(f"{what} is not claimed ({r.title})")
                    break
                case Verdict.FAIL:
                    problems.append(f"{what} fails ({r.title})")
                    break
    return problems
