"""`explain`: for each op of a model on a device, the kernel chosen and why each other candidate was refused. Loads no weight."""

from __future__ import annotations

from dataclasses import replace

import torch

from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.selection import ExplainRow, OpTable
from sglang_core.config import EngineConfig
from sglang_core.engine.build import build_context, op_table
from sglang_core.engine.mesh import RankOf
from sglang_core.engine.resolve import Resolved, resolve
from sglang_core.layers.build import bind_model, packings
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.packing import Packing, totals
from sglang_core.runner.sampler import Sampler


def explain(config: EngineConfig, device: ChosenDevice | None = None) -> list[ExplainRow]:
    """Bind the model's layers and the sampler as the engine would on one rank, and say how each op was decided.

    Of quantised weights, also what becomes of them and how many bytes that takes, over all layers of the class. `device`
    stands for the config's.
    """
    table, model = bound_model(resolve(config, device))
    plans = {(p.op, p.layer, p.fmt): p for p in totals(packings(model))}
    return [_with_plan(row, plans.get((row.op, row.layer, row.fmt))) for row in table.explain()]


def bound_model(resolved: Resolved) -> tuple[OpTable, CausalLM]:
    """The model without weights, and the ops that it and the sampler would run on rank 0."""
    table = op_table(resolved)
    model = resolved.model_class(resolved.model)
    tp = RankOf(0, resolved.config.parallel.tp_size)
    bind_model(model, build_context(resolved, table, torch.device("meta"), tp))
    Sampler(table, resolved.model.vocab_size, model.logits_dtype)
    return table, model


def _with_plan(row: ExplainRow, plan: Packing | None) -> ExplainRow:
    return row if plan is None else replace(row, why=f"{plan.describe()}: {row.why}")
