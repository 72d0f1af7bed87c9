"""Whole steps of published shapes compiled for TPUs by libtpu, with no TPU, and what comes out held to a budget.

    python benchmarks/tpu/steps.py                                  # all, against the section "steps" of budgets.json
    python benchmarks/tpu/steps.py --only llama --chip v6e          # some
    python benchmarks/tpu/steps.py --quick --chip v6e               # a minute or two
    python benchmarks/tpu/steps.py --write                          # what is used now becomes the budget

Nothing of a model is allocated. A decode step's traffic, counted in the compiled program, is shown over the least it could be: its
weights without the embedding's rows that it does not read and the experts that its tokens cannot all meet, and the keys and values of its
reqs, once each. That a step compiles says nothing of its results, and nothing here was timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang_tpu.aot_steps import AotBackend, CompiledStep
from sglang_tpu.backend import TPU_PAGE
from sglang_tpu.chips import CHIPS
from sglang_tpu.mesh import AXIS
from sglang_tpu.topology import mesh_of
from torch import Tensor

from sglang_core.api import Bucket
from sglang_core.backend.devices import ChosenDevice
from sglang_core.config import EngineConfig
from sglang_core.engine.build import Rank, build_rank
from sglang_core.layers.experts import Experts
from sglang_core.weights.loader import count_weight_bytes
from sglang_core.weights.pool_sizes import SCRATCH_PAGES

CONFIGS = Path(__file__).parents[1] / "configs"
BUDGETS = Path(__file__).parent / "budgets.json"
SECTION = "steps"
LEAST_CHUNK = 2  # tokens that the scheduler wants room for in a step
SLACK = 1.02  # of a written budget over what was used: releases of the compiler differ by some
STORED: Mapping[str, Mapping[str, Any]] = {  # what config.json says of each format
    "": {},
    "fp8.block128": {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    },
}
BUDGETED = ("arguments", "results", "temporary", "vmem", "traffic")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model, perhaps with facts of its config.json changed, and its two steps: of `num_reqs` reqs of `length` tokens each, or of
    a prompt of `prompt` tokens."""

    config: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    fmt: str = ""  # of the checkpoint's linear layers and experts; "" for bfloat16
    chips: tuple[str, ...]
    num_devices: int = 1  # as many ranks
    dealt: bool = False  # experts are whole, each on one rank (--ep-size); else every rank has a share of each
    num_reqs: int = 8
    length: int = 1024
    prompt: int = 256
    quick: bool = False  # for a run of some minutes: one case of each model

    @property
    def name(self) -> str:
        over = [f"on {self.num_devices}" + ", experts dealt" * self.dealt] if self.num_devices > 1 else []
        fmt = [self.fmt] if self.fmt else []
        return " ".join([self.config, *fmt, *(f"{key}={value}" for key, value in self.changes.items()), *over])

    @property
    def steps(self) -> dict[str, tuple[int, int]]:
        """Tokens and reqs of each."""
        return {
            f"decode of {self.num_reqs} x {self.length}": (self.num_reqs, self.num_reqs),
            f"prefill of {self.prompt}": (self.prompt, 1),
        }


ALL = ("v5e", "v6e", "7x")
LLAMA = {"num_hidden_layers": 4}
QWEN = {"num_hidden_layers": 4}
DEEPSEEK = {"num_hidden_layers": 2, "first_k_dense_replace": 1}  # a dense layer, and one of experts
LARGE = ("v6e", "7x")  # chips that what 16 GiB do not hold fits on

CASES = (
    Case(config="llama-3.1-8b", chips=LARGE),
    *(Case(config="llama-3.1-8b", changes=LLAMA, chips=ALL, num_devices=n, quick=n == 1) for n in (1, 4, 8)),
    *(Case(config="qwen3-30b-a3b", changes=QWEN, chips=ALL, num_devices=n, quick=n == 4) for n in (1, 4, 8)),
    Case(config="deepseek-v3", changes=DEEPSEEK, chips=LARGE, quick=True),
    Case(config="deepseek-v3", fmt="fp8.block128", changes=DEEPSEEK, chips=ALL),
    *(Case(config="deepseek-v3", changes=DEEPSEEK, chips=ALL, num_devices=n) for n in (4, 8)),
    Case(config="qwen3-30b-a3b", changes=QWEN, chips=ALL, num_devices=4, dealt=True),
    Case(config="deepseek-v3", changes=DEEPSEEK, chips=ALL, num_devices=8, dealt=True),
)


def compiled(case: Case, chip: str, title: str) -> tuple[list[CompiledStep], int]:
    """The programs of one step, and for a decode step the least bytes that it could move; 0 for others."""
    num_tokens, num_reqs = case.steps[title]
    with tempfile.TemporaryDirectory() as folder:
        facts = json.loads((CONFIGS / f"{case.config}.json").read_text()) | dict(case.changes) | STORED[case.fmt]
        Path(folder, "config.json").write_text(json.dumps(facts))
        config = EngineConfig.from_flat(
            model_path=folder,
            device="tpu",
            dtype="bfloat16",
            load_format="dummy",
            skip_tokenizer_init=True,
            context_length=case.length,
            max_running_requests=num_reqs,
            max_total_tokens=num_reqs * case.length,
            chunked_prefill_size=max(num_tokens, LEAST_CHUNK),
            mem_fraction_static=1.0,
            tp_size=case.num_devices,
            ep_size=case.num_devices if case.dealt else 1,
        )
        bucket = Bucket(
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            max_extend=num_tokens // num_reqs,
            num_pages=-(-case.length // TPU_PAGE),
        )
        backend = AotBackend(CHIPS[chip], mesh_of(CHIPS[chip], case.num_devices, AXIS), [bucket])
        (info,) = backend.probe()
        device = ChosenDevice(backend=backend, info=info, reason="compiled for")
        rank = build_rank(config, 0, world_size=1, directory=None, progress=False, device=device)
        rank.runner.warm_up(progress=False)
    assert backend.runtime is not None
    return backend.runtime.compiled, least_traffic(rank, num_tokens) if num_tokens == num_reqs else 0


def least_traffic(rank: Rank, num_tokens: int) -> int:
    """Bytes that a rank must read for a decode step over full pools, each of whose tokens meets experts of its own, as many as can be the rank's.

    Weights but an embedding that is only looked up in, and the pools.
    """
    cfg = rank.resolved.model
    tp_size = rank.resolved.config.parallel.tp_size
    embedding = 0 if cfg.tie_embeddings else -(-cfg.vocab_size // tp_size) * cfg.hidden_size * 2
    pools = 0
    for group, pool in rank.state.pools.items():
        pages = rank.num_pages[group]
        pools += nbytes(pool.leaves) * (pages - SCRATCH_PAGES) // pages
    unmet = 0
    for layer in rank.model.modules():
        if isinstance(layer, Experts):
            met = min(layer.num_held, num_tokens * layer.moe.route.top_k)
            stacks = nbytes([*layer.w13.buffers(), *layer.w2.buffers()])
            unmet += stacks * (layer.num_held - met) // layer.num_held
    return count_weight_bytes(rank.model) - embedding - unmet + pools


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of a rank's parts: what lies on a mesh counts so too."""
    return sum(x.numel() * x.element_size() for x in tensors)


def problems(step: CompiledStep, budget: Mapping[str, int] | None, hbm_bytes: int) -> Iterator[str]:
    """`budget`: None where the file has none."""
    if step.num_aliased < step.num_state:
        yield f"{step.num_state - step.num_aliased} of {step.num_state} tensors of the state are copied"
    for transfer in step.host_transfers:
        yield f"waits for the host: {transfer}"
    if step.held > hbm_bytes:
        yield f"holds {step.held} bytes, and the device has {hbm_bytes}"
    if budget is None:
        yield "has no budget; run with --write, and look at what it says"
        return
    for what, most in budget.items():
        if getattr(step, what) > most:
            yield f"{getattr(step, what)} bytes of {what}, and its budget is {most}"


def examine(case: Case, chip: str, budgets: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """Budgets from what is used now, by step, and what is wrong, in lines. `budgets` None: nothing is compared."""
    used: dict[str, Any] = {}
    wrong = []
    for title in case.steps:
        started = time.monotonic()
        where = f"{chip} {case.name}, {title}"
        try:
            steps, least = compiled(case, chip, title)
        except Exception as e:  # the compiler's own
            wrong.append(f"{where}: does not compile: {type(e).__name__}: {str(e)[:500]}")
            continue
        for step in steps:
            key = f"{case.name}, {title}, {step.name}"
            used[key] = {what: round(getattr(step, what) * SLACK) for what in BUDGETED}
            budget = used[key] if budgets is None else budgets.get(key)
            wrong += [f"{chip} {key}: {text}" for text in problems(step, budget, CHIPS[chip].hbm_bytes)]
            over = f", {step.traffic / least:.3f} of the least" if least and step.name == "forward_step" else ""
            print(
                f"{chip} {key}: {gib(step.arguments)} arguments, {gib(step.temporary)} temporary, {gib(step.held)} in all, {gib(step.vmem)} VMEM; "
                f"moves {gib(step.traffic)}{over}",
                flush=True,
            )
        print(f"  in {time.monotonic() - started:.0f} s", flush=True)
    return used, wrong


def gib(count: int) -> str:
    return f"{count / 2**30:.3f} GiB"


def main(argv: list[str] | None = None) -> int:
    """0: all compiles, within its budgets. 1: not so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="one case of each model")
    parser.add_argument("--write", action="store_true", help="make what is used now the budget")
    args = parser.parse_args(argv)
    budgets = json.loads(BUDGETS.read_text()).get(SECTION, {}) if BUDGETS.exists() else {}
    wrong: list[str] = []
    for case in [c for c in CASES if args.only in c.name and (c.quick or not args.quick)]:
        for chip in [c for c in args.chip if c in case.chips]:
            made, found = examine(case, chip, None if args.write else budgets.get(chip, {}))
            wrong += found
            if args.write:
                keep(chip, made)
    for line in wrong:
        print(f"FAIL {line}", file=sys.stderr)
    return 1 if wrong else 0


def keep(chip: str, made: Mapping[str, Any]) -> None:
    """Put them into the file at once: all of it takes long, and kernels have a section of their own there."""
    whole = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    whole.setdefault(SECTION, {}).setdefault(chip, {}).update(made)
    BUDGETS.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    sys.exit(main())
