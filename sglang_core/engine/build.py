"""From a config to a running engine: open the device, build the model, size the pools, join scheduler and runner."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from rich.console import Console

from sglang_core import __version__
from sglang_core.backend.communicator import Communicator, LocalCommunicator
from sglang_core.backend.interface import DeviceRuntime, RuntimeContext
from sglang_core.backend.pool import PoolSpec
from sglang_core.backend.selection import Instrument, OpTable, parse_overrides
from sglang_core.cache.page_allocator import PageAllocator
from sglang_core.cache.radix import EVICTION_POLICIES, RadixCache
from sglang_core.config import EngineConfig
from sglang_core.engine.channel import PlanSender
from sglang_core.engine.core import EngineCore
from sglang_core.engine.requests import EngineInfo
from sglang_core.engine.resolve import UNLIMITED_CHUNK, Resolved, resolve
from sglang_core.errors import ConfigError
from sglang_core.layers.build import BuildContext, bind_model
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.forward_batch import StepState
from sglang_core.ops import OPS
from sglang_core.runner.model_runner import ModelRunner
from sglang_core.runner.slot_table import SlotTable
from sglang_core.runner.verify import KernelVerifier
from sglang_core.scheduler.config import SchedulerConfig
from sglang_core.scheduler.scheduler import Scheduler
from sglang_core.types import FULL, PoolGroup
from sglang_core.weights.fit import FitTable, activation_bytes
from sglang_core.weights.generation_config import read_generation_config
from sglang_core.weights.loader import count_weight_bytes, load_model

log = logging.getLogger(__name__)
T = TypeVar("T")
SCRATCH_PAGES = 1  # page 0 of every pool


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One rank, ready to execute plans."""

    resolved: Resolved
    runtime: DeviceRuntime
    table: OpTable
    model: CausalLM
    runner: ModelRunner
    state: StepState
    num_pages: int
    verifier: KernelVerifier | None


def build_engine(config: EngineConfig, *, world_size: int, directory: Path | None, progress: bool) -> EngineCore:
    """Rank 0: its model and runner, and the scheduler over them."""
    started = time.monotonic()
    rank = build_rank(config, 0, world_size=world_size, directory=directory, progress=progress)
    rank.runner.warm_up(progress=progress)
    resolved, settled = rank.resolved, rank.resolved.config
    page_size = _page_size(settled)
    on_free = rank.runner.poison if rank.runtime.poisons_freed_pages else None
    allocator = {FULL: PageAllocator(rank.num_pages, on_free)}
    policy = EVICTION_POLICIES[settled.cache.radix_eviction_policy]()
    cache = None if settled.cache.disable_radix_cache else RadixCache(page_size, policy=policy)
    scheduler = Scheduler(scheduler_config(resolved), cache, allocator, time.monotonic)
    generation = read_generation_config(resolved.folder)
    eos_ids = _eos_ids(resolved.hf_config, generation)
    info = EngineInfo(
        model_path=settled.model.model_path,
        served_model_name=resolved.served_model_name,
        context_length=resolved.context_length,
        vocab_size=resolved.model.vocab_size,
        max_running_requests=_required(settled.schedule.max_running_requests),
        max_queued_requests=_required(settled.schedule.max_queued_requests),
        max_total_tokens=(rank.num_pages - SCRATCH_PAGES) * page_size,
        page_size=page_size,
        dtype=settled.model.dtype,
        device=resolved.device.info.label,
        architecture=resolved.model.architecture,
        eos_token_ids=tuple(sorted(eos_ids)),
        generation_defaults=generation,
        settings={k: v for k, v in settled.flat().items() if not k.endswith("api_key")},
        version=__version__,
    )
    sender = PlanSender(directory, world_size) if directory is not None and world_size > 1 else None
    log.info("ready in %.1f s: %s", time.monotonic() - started, banner(rank))
    return EngineCore(
        scheduler,
        rank.runner,
        eos_ids=eos_ids,
        max_in_flight=scheduler.config.max_in_flight,
        clock=time.monotonic,
        info=msgspec.to_builtins(info),
        extra_stats=lambda: {
            "fallbacks": float(rank.table.fallbacks),
            **(rank.verifier.stats() if rank.verifier is not None else {}),
        },
        on_step=sender.send if sender is not None else lambda plan: None,
    )


def build_follower(config: EngineConfig, rank: int, *, world_size: int, directory: Path) -> tuple[ModelRunner, int]:
    """Another rank: its runner, and how many steps it may have in flight."""
    built = build_rank(config, rank, world_size=world_size, directory=directory, progress=False)
    built.runner.warm_up(progress=False)
    return built.runner, scheduler_config(built.resolved).max_in_flight


def build_rank(
    config: EngineConfig,
    rank: int,
    *,
    world_size: int,
    directory: Path | None,
    progress: bool,
    instrument: Instrument | None = None,
) -> Rank:
    """Open the device and load this rank's part of the model. `instrument` is put around every op, to measure it."""
    resolved = resolve(config)
    settled, device = resolved.config, resolved.device
    runtime = device.backend.create_runtime(
        RuntimeContext(
            devices=(device.info,),
            rank=rank,
            world_size=world_size,
            num_threads=settled.device.num_threads,
            dist_timeout=settled.parallel.dist_timeout,
        )
    )
    tp = _tensor_parallel(runtime, rank, world_size, directory)
    verifier = None
    if settled.device.verify_kernels > 0:
        verifier = KernelVerifier(settled.device.verify_kernels, OPS, seed=settled.schedule.random_seed)
        instrument = verifier.instrument
    table = op_table(resolved, instrument)
    model, ctx = resolved.model_class(resolved.model), build_context(resolved, table, runtime.torch_device, tp)
    bind_model(model, ctx)
    fit = fit_table(resolved, runtime, model, tp)
    if progress:
        Console(stderr=True).print(fit.render())
    fit.check()
    load_model(
        model,
        resolved.folder,
        ctx,
        load_format=settled.model.load_format,
        seed=settled.schedule.random_seed,
        progress=progress,
    )
    return _with_pools(resolved, runtime, table, model, tp, verifier)


def fit_table(resolved: Resolved, runtime: DeviceRuntime, model: CausalLM, tp: Communicator) -> FitTable:
    """How this rank's memory will divide, from shapes: the model is bound and not loaded."""
    settled, memory = resolved.config, runtime.memory()
    specs = _pool_specs(resolved, model)
    activations = activation_bytes(
        resolved.model,
        num_tokens=scheduler_config(resolved).token_budget,
        num_rows=_required(settled.schedule.max_running_requests),
        itemsize=getattr(torch, settled.model.dtype).itemsize,
        tp_size=tp.size,
    )
    return FitTable(
        device=resolved.device.info.label,
        total=memory.total,
        free=memory.free,
        mem_fraction=_required(settled.cache.mem_fraction_static),
        weights=count_weight_bytes(model),
        activations=activations,
        kv_per_token=sum(spec.bytes_per_token for spec in specs.values()),
        page_size=_page_size(settled),
        context_length=resolved.context_length,
        max_total_tokens=settled.cache.max_total_tokens,
        context_asked=resolved.context_asked,
    )


def op_table(resolved: Resolved, instrument: Instrument | None = None) -> OpTable:
    """The kernels to choose from on the resolved device, under the user's overrides and policies."""
    settled, device = resolved.config, resolved.device
    return OpTable(
        device.info,
        device.backend,
        ops=OPS,
        overrides=parse_overrides(settled.device.kernel),
        fallback=settled.device.fallback,
        deterministic=settled.device.deterministic,
        page_size=_page_size(settled),
        instrument=instrument,
    )


def build_context(resolved: Resolved, table: OpTable, device: torch.device, tp: Communicator) -> BuildContext:
    """What the model's layers are built with."""
    settled = resolved.config
    return BuildContext(
        table=table,
        dtype=getattr(torch, settled.model.dtype),
        device=device,
        context_length=resolved.context_length,
        page_size=_page_size(settled),
        kv_dtype=settled.cache.kv_cache_dtype,
        tp=tp,
    )


def _with_pools(
    resolved: Resolved,
    runtime: DeviceRuntime,
    table: OpTable,
    model: CausalLM,
    tp: Communicator,
    verifier: KernelVerifier | None,
) -> Rank:
    settled = resolved.config
    page_size, max_running = _page_size(settled), _required(settled.schedule.max_running_requests)
    specs = {
        group: replace(spec, layout=table.pool_layout(group)) for group, spec in _pool_specs(resolved, model).items()
    }
    num_pages = _num_pages(resolved, runtime, specs, tp)
    max_pages_per_req = -(-resolved.context_length // page_size)
    buckets = runtime.buckets(
        max_num_tokens=scheduler_config(resolved).token_budget,
        max_num_reqs=max_running,
        max_num_pages=max_pages_per_req,
    )
    state = StepState(
        pools={group: runtime.alloc_pool(spec, num_pages) for group, spec in specs.items()},
        next_token_ids=torch.zeros(max_running + 1, dtype=torch.int32, device=runtime.torch_device),
    )
    slots = SlotTable(max_running, max_pages_per_req, resolved.model.vocab_size, tuple(specs))
    runner = ModelRunner(
        model,
        table,
        runtime,
        state,
        slots,
        vocab_size=resolved.model.vocab_size,
        page_size=page_size,
        buckets=buckets,
        verifier=verifier,
    )
    return Rank(
        resolved=resolved,
        runtime=runtime,
        table=table,
        model=model,
        runner=runner,
        state=state,
        num_pages=num_pages,
        verifier=verifier,
    )


def scheduler_config(resolved: Resolved) -> SchedulerConfig:
    settled = resolved.config
    chunk = _required(settled.schedule.chunked_prefill_size)
    return SchedulerConfig(
        max_running=_required(settled.schedule.max_running_requests),
        max_queued=settled.schedule.max_queued_requests,
        context_length=resolved.context_length,
        page_size=_page_size(settled),
        token_budget=resolved.context_length if chunk == UNLIMITED_CHUNK else chunk,
        chunked=chunk != UNLIMITED_CHUNK,
        policy=settled.schedule.schedule_policy,
        max_in_flight=1 if settled.schedule.disable_overlap_schedule else 2,
        random_seed=settled.schedule.random_seed,
    )


def banner(rank: Rank) -> str:
    """What a person wants to see at start: model, device, pool, and how many ops run their reference body."""
    resolved, settled = rank.resolved, rank.resolved.config
    rows = rank.table.explain()
    kernels = sum(row.provider != "reference" for row in rows)
    return (
        f"{resolved.model.architecture} in {settled.model.dtype} on {resolved.device.info.label} ({resolved.device.info.path}), "
        f"context {resolved.context_length}, KV pool {(rank.num_pages - SCRATCH_PAGES) * _page_size(settled)} tokens, "
        f"{kernels} of {len(rows)} op sites run kernels, {rank.table.fallbacks} fallbacks"
    )


def _pool_specs(resolved: Resolved, model: CausalLM) -> dict[PoolGroup, PoolSpec]:
    settled = resolved.config
    return model.pool_specs(_page_size(settled), getattr(torch, settled.cache.kv_cache_dtype))


def _num_pages(
    resolved: Resolved, runtime: DeviceRuntime, specs: Mapping[PoolGroup, PoolSpec], tp: Communicator
) -> int:
    """Pages of each pool, scratch included: what was asked for, else what fits, never more than could be used."""
    settled, page_size = resolved.config, _page_size(resolved.config)
    bytes_per_page = sum(spec.bytes_per_page for spec in specs.values())
    memory = runtime.memory()
    budget = int(memory.free - (1 - _required(settled.cache.mem_fraction_static)) * memory.total)
    fits = budget // bytes_per_page - SCRATCH_PAGES
    if settled.cache.max_total_tokens is not None:
        pages = -(-settled.cache.max_total_tokens // page_size)
        if pages > fits:
            raise ConfigError(
                f"max_total_tokens={settled.cache.max_total_tokens} needs {pages * bytes_per_page / 2**30:.2f} GiB of KV pool and "
                f"{max(budget, 0) / 2**30:.2f} GiB are left; lower it, or raise --mem-fraction-static"
            )
    else:
        max_running = _required(settled.schedule.max_running_requests)
        useful = max_running * -(-resolved.context_length // page_size)
        pages = min(fits, useful)
    if pages < 1:
        raise ConfigError(
            f"no room for a KV pool: {memory.free / 2**30:.2f} GiB of {memory.total / 2**30:.2f} GiB are free after loading; "
            "raise --mem-fraction-static, lower --context-length, or free memory"
        )
    agreed = torch.tensor([-pages], dtype=torch.int64)
    if tp.size > 1:  # every rank must use the same page ids: take the smallest
        gathered = tp.all_gather(agreed.to(runtime.torch_device), dim=0).cpu()
        pages = -int(gathered.max())
    return pages + SCRATCH_PAGES


def _tensor_parallel(runtime: DeviceRuntime, rank: int, world_size: int, directory: Path | None) -> Communicator:
    if world_size == 1:
        return LocalCommunicator()
    assert directory is not None, "several ranks meet in a directory"
    store = dist.FileStore(str(directory / "rendezvous"), world_size)  # type: ignore[attr-defined]
    return runtime.communicator(range(world_size), rank, store)


def _eos_ids(hf_config: Mapping[str, Any], generation: Mapping[str, Any]) -> frozenset[int]:
    """Ids that end an answer: the generation config's, else the model's."""
    ids = generation.get("eos_token_id", hf_config.get("eos_token_id"))
    return frozenset([ids] if isinstance(ids, int) else ids or [])


def _page_size(config: EngineConfig) -> int:
    return _required(config.cache.page_size)


def _required(value: T | None) -> T:
    assert value is not None, "resolve() settles every auto"
    return value
