"""From a config to a running engine: open the device, build the model, size the pools, join scheduler and runner."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from rich.console import Console

from sglang_core import __version__
from sglang_core.backend.communicator import Communicator, LocalCommunicator
from sglang_core.backend.devices import ChosenDevice
from sglang_core.backend.interface import DeviceRuntime, RuntimeContext
from sglang_core.backend.placement import place
from sglang_core.backend.pool import PoolSpec
from sglang_core.backend.selection import Instrument, OpTable, parse_overrides
from sglang_core.cache.page_allocator import PageAllocator
from sglang_core.cache.radix import EVICTION_POLICIES, RadixCache
from sglang_core.config import EngineConfig
from sglang_core.engine.adapters import Adapters
from sglang_core.engine.channel import PlanSender
from sglang_core.engine.core import EngineCore
from sglang_core.engine.mesh import check_mesh, loaded_ranks
from sglang_core.engine.pools import alloc_pool, main_pages, pool_sizes, pool_specs
from sglang_core.engine.requests import EngineInfo
from sglang_core.engine.resolve import Resolved, required, resolve, scheduler_config
from sglang_core.errors import ConfigError
from sglang_core.layers.build import BuildContext, bind_model, packings
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.forward_batch import StepState
from sglang_core.layers.lora import ModelSlots
from sglang_core.layers.packing import totals
from sglang_core.ops import OPS
from sglang_core.runner.adapters import AdapterHost, adapter_key
from sglang_core.runner.model_runner import ModelRunner
from sglang_core.runner.slot_table import SlotTable
from sglang_core.runner.verify import KernelVerifier
from sglang_core.scheduler.scheduler import Scheduler
from sglang_core.types import PoolGroup
from sglang_core.weights.fit import FitTable, activation_bytes
from sglang_core.weights.generation_config import read_generation_config
from sglang_core.weights.loader import count_weight_bytes, load_model
from sglang_core.weights.packed_cache import PackedCache
from sglang_core.weights.pool_sizes import SCRATCH_PAGES

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """One rank, or those that this process drives together, ready to execute plans."""

    resolved: Resolved
    runtime: DeviceRuntime
    table: OpTable
    model: CausalLM  # of the first rank
    runner: ModelRunner
    state: StepState
    num_pages: Mapping[PoolGroup, int]  # of each pool, scratch included
    max_total_tokens: int
    verifier: KernelVerifier | None
    adapters: AdapterHost | None
    adapter_versions: Mapping[str, str]  # of the adapters loaded at start, by name


def build_engine(
    engine_config: EngineConfig,
    *,
    world_size: int,
    directory: Path | None,
    progress: bool,
    replica: int = 0,
    device: ChosenDevice | None = None,
) -> EngineCore:
    """Rank 0 of a replica: its model and runner, and the scheduler over them. `device` stands for the config's."""
    started = time.monotonic()
    rank = build_rank(
        engine_config, 0, world_size=world_size, directory=directory, progress=progress, replica=replica, device=device
    )
    rank.runner.warm_up(progress=progress)
    late_compiles = _count_late_compiles(rank.runtime)
    resolved, settled = rank.resolved, rank.resolved.config
    page_size = resolved.page_size
    config = replace(
        scheduler_config(resolved), groups=tuple(pool.spec.group_spec for pool in rank.state.pools.values())
    )
    allocators = {group: PageAllocator(n, _on_free(rank, group)) for group, n in rank.num_pages.items()}
    policy = EVICTION_POLICIES[settled.cache.radix_eviction_policy]()
    cache = None if settled.cache.disable_radix_cache else RadixCache(page_size, config.tree_groups, policy)
    scheduler = Scheduler(config, cache, allocators, time.monotonic)
    generation = read_generation_config(resolved.folder)
    eos_ids = _eos_ids(resolved.hf_config, generation)
    info = EngineInfo(
        model_path=settled.model.model_path,
        served_model_name=resolved.served_model_name,
        context_length=resolved.context_length,
        vocab_size=resolved.model.vocab_size,
        max_running_requests=required(settled.schedule.max_running_requests),
        max_queued_requests=required(settled.schedule.max_queued_requests),
        max_total_tokens=rank.max_total_tokens,
        page_size=page_size,
        dtype=settled.model.dtype,
        device=resolved.device.info.label,
        architecture=resolved.model.architecture,
        eos_token_ids=tuple(sorted(eos_ids)),
        generation_defaults=generation,
        settings={k: v for k, v in settled.flat().items() if not k.endswith("api_key")},
        version=__version__,
        adapters={} if resolved.lora is None else {name: s.path for name, s in resolved.lora.sources.items()},
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
            **late_compiles(),
            **rank.runner.stats(),
            **(rank.verifier.stats() if rank.verifier is not None else {}),
        },
        on_step=sender.send if sender is not None else lambda plan: None,
        adapters=_adapters(rank, scheduler, sender),
    )


def _count_late_compiles(runtime: DeviceRuntime) -> Callable[[], Mapping[str, float]]:
    """Step programs compiled from now on; nothing where the device compiles none."""
    at_start = runtime.num_compiles()

    def late() -> Mapping[str, float]:
        compiled = runtime.num_compiles()
        return {} if compiled is None or at_start is None else {"late_compiles": float(compiled - at_start)}

    return late


def _adapters(rank: Rank, scheduler: Scheduler, sender: PlanSender | None) -> Adapters | None:
    setup = rank.resolved.lora
    if setup is None or rank.adapters is None:
        return None
    tell = sender.send if sender is not None else lambda message: None
    adapters = Adapters(rank.adapters, scheduler, max_loaded=setup.max_loaded, tell=tell)
    for name, version in rank.adapter_versions.items():
        adapters.start_with(setup.sources[name], version)
    return adapters


def _on_free(rank: Rank, group: PoolGroup) -> Callable[[Sequence[int]], None] | None:
    return functools.partial(rank.runner.poison, group) if rank.runtime.poisons_freed_pages else None


def build_follower(
    config: EngineConfig, rank: int, *, world_size: int, directory: Path, replica: int
) -> tuple[ModelRunner, int]:
    """Another rank: its runner, and how many steps it may have in flight."""
    built = build_rank(config, rank, world_size=world_size, directory=directory, progress=False, replica=replica)
    built.runner.warm_up(progress=False)
    return built.runner, scheduler_config(built.resolved).max_in_flight


def build_rank(
    config: EngineConfig,
    rank: int,
    *,
    world_size: int,
    directory: Path | None,
    progress: bool,
    replica: int = 0,
    instrument: Instrument | None = None,
    device: ChosenDevice | None = None,
) -> Rank:
    """Open the device and load this rank's part of the model; or open a mesh, and load the part of each of its ranks.

    `rank` and `world_size` are of the processes of a replica. `instrument` is put around every op, to measure it.
    """
    resolved = resolve(config, device)
    settled, device = resolved.config, resolved.device
    sizes = settled.parallel
    placed = place(device, tp_size=sizes.tp_size, dp_size=sizes.dp_size, replica=replica, rank=rank)
    runtime = device.backend.create_runtime(
        RuntimeContext(
            devices=placed.devices,
            rank=rank,
            world_size=world_size,
            share=placed.share,
            num_shares=placed.num_shares,
            num_threads=settled.device.num_threads,
            dist_timeout=settled.parallel.dist_timeout,
            watched=instrument is not None or settled.device.verify_kernels > 0,
            strict_compile=settled.device.strict_compile,
            prefill_graph_tokens=required(settled.device.prefill_graph_tokens),
        )
    )
    if settled.device.prefill_graph_tokens and not runtime.captures_prefills:
        raise ConfigError(
            f"prefill_graph_tokens={settled.device.prefill_graph_tokens}: device {device.info.label} captures no steps with prefill;"
            " leave out --prefill-graph-tokens"
        )
    groups = _tensor_parallel(runtime, rank, world_size, len(placed.devices), directory)
    verifier = None
    if settled.device.verify_kernels > 0:
        verifier = KernelVerifier(settled.device.verify_kernels, OPS, seed=settled.schedule.random_seed)
        instrument = verifier.instrument
    table = op_table(resolved, instrument)
    if len(placed.devices) > 1:
        check_mesh(resolved, table, build_context)
    contexts = [build_context(resolved, table, runtime.torch_device, tp) for tp in groups]
    model, ctx = resolved.model_class(resolved.model), contexts[0]
    bind_model(model, ctx)
    slots = None if ctx.lora is None else ModelSlots(model, ctx.lora)
    fit = fit_table(resolved, runtime, model, ctx.tp, extra_weights=0 if slots is None else slots.nbytes)
    if progress:
        Console(stderr=True).print(fit.render())
    fit.check()
    for plan in totals(packings(model)):
        log.log(logging.INFO if plan.plan == "kernel" else logging.WARNING, "%s: %s", plan.layer, plan.describe())
    load = functools.partial(
        load_model,
        source=resolved.folder,
        load_format=settled.model.load_format,
        seed=settled.schedule.random_seed,
        progress=progress,
        packed_cache=None
        if (folder := settled.model.packed_cache) is None
        else PackedCache(Path(folder), runtime.alloc_packed),
    )

    def with_slots(part: CausalLM, ctx: BuildContext) -> CausalLM:
        part = load(part, ctx=ctx)
        if slots is not None and ctx.lora is not None:
            mine = slots if ctx is contexts[0] else ModelSlots(part, ctx.lora)
            mine.allocate(runtime.torch_device)
            if mine is not slots:
                slots.others.append(mine)
        return part

    model = runtime.join_ranks(loaded_ranks(model, contexts, with_slots))
    adapters, versions = None, {}
    if slots is not None and resolved.lora is not None:
        adapters = AdapterHost(model, slots)
        for name, source in resolved.lora.sources.items():
            files, adapter = adapters.read_now(source.path)
            versions[name] = files.version
            adapters.add(adapter_key(name, files.version), adapter)
    agree = ctx.tp if world_size > 1 else LocalCommunicator()
    return _with_pools(resolved, runtime, table, model, agree, verifier, adapters, versions)


def fit_table(
    resolved: Resolved, runtime: DeviceRuntime, model: CausalLM, tp: Communicator, *, extra_weights: int = 0
) -> FitTable:
    """How this rank's memory will divide, from shapes: the model is bound and not loaded."""
    settled, memory = resolved.config, runtime.memory()
    activations = activation_bytes(
        resolved.model,
        num_tokens=scheduler_config(resolved).token_budget,
        num_rows=required(settled.schedule.max_running_requests),
        itemsize=getattr(torch, settled.model.dtype).itemsize,
        tp_size=tp.size,
        ep_size=settled.parallel.ep_size,
    )
    return FitTable(
        device=resolved.device.info.label,
        total=memory.total,
        free=memory.free,
        mem_fraction=required(settled.cache.mem_fraction_static),
        weights=count_weight_bytes(model) + extra_weights,
        weights_note="\n".join(p.describe() for p in totals(packings(model), "fmt", "plan")),
        activations=activations,
        pools=pool_sizes(resolved, pool_specs(resolved, model)),
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
        quant_fallback=settled.device.quant_fallback,
        deterministic=settled.device.deterministic,
        page_size=resolved.page_size,
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
        page_size=resolved.page_size,
        kv_dtype=settled.cache.kv_cache_dtype,
        tp=tp,
        ep_size=settled.parallel.ep_size,
        lora=None if resolved.lora is None else resolved.lora.spec,
    )


def _with_pools(
    resolved: Resolved,
    runtime: DeviceRuntime,
    table: OpTable,
    model: CausalLM,
    processes: Communicator,
    verifier: KernelVerifier | None,
    adapters: AdapterHost | None,
    adapter_versions: Mapping[str, str],
) -> Rank:
    settled = resolved.config
    page_size, max_running = resolved.page_size, required(settled.schedule.max_running_requests)
    specs = {
        group: replace(spec, layout=table.pool_layout(group)) for group, spec in pool_specs(resolved, model).items()
    }
    sizes = pool_sizes(resolved, specs)
    pages = main_pages(resolved, runtime, sizes, processes)
    num_pages = {group: n + SCRATCH_PAGES for group, n in sizes.pages(pages).items()}
    max_pages_per_req = -(-resolved.context_length // page_size)
    buckets = runtime.buckets(
        max_num_tokens=scheduler_config(resolved).token_budget,
        max_num_reqs=max_running,
        max_num_pages=max_pages_per_req,
    )
    state = StepState(
        pools={group: alloc_pool(runtime, spec, num_pages[group]) for group, spec in specs.items()},
        next_token_ids=torch.zeros(max_running + 1, dtype=torch.int32, device=runtime.torch_device),
    )
    model.prepare_pools(state.pools)
    kv_specs = [spec for spec in specs.values() if isinstance(spec, PoolSpec)]
    paged = tuple(spec.group for spec in kv_specs if spec.encoder_len is None)
    encoder_columns = max((-(-(spec.encoder_len or 0) // page_size) for spec in kv_specs), default=0)
    slots = SlotTable(max_running, max_pages_per_req, resolved.model.vocab_size, paged, encoder_columns)
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
        adapters=adapters,
    )
    return Rank(
        resolved=resolved,
        runtime=runtime,
        table=table,
        model=model,
        runner=runner,
        state=state,
        num_pages=num_pages,
        max_total_tokens=pages * page_size,
        verifier=verifier,
        adapters=adapters,
        adapter_versions=adapter_versions,
    )


def banner(rank: Rank) -> str:
    """What a person wants to see at start: model, device, pool, and how many ops run their reference body."""
    resolved, settled = rank.resolved, rank.resolved.config
    rows = rank.table.explain()
    kernels = sum(row.provider != "reference" for row in rows)
    notes = dict.fromkeys(kernel.note for bound in rank.table.bound_ops for kernel in bound.kernels if kernel.note)
    return (
        f"{resolved.model.architecture} in {settled.model.dtype} on {resolved.device.info.label} ({resolved.device.info.path}), "
        f"context {resolved.context_length}, KV pool {rank.max_total_tokens} tokens, "
        f"{kernels} of {len(rows)} op sites run kernels, {rank.table.fallbacks} fallbacks"
        + "".join(f", {note}" for note in notes)
    )


def _tensor_parallel(
    runtime: DeviceRuntime, rank: int, world_size: int, num_driven: int, directory: Path | None
) -> list[Communicator]:
    """Of each rank that this process drives: `num_driven`, which are all, or the one of the process."""
    if num_driven > 1:
        return [runtime.communicator(range(num_driven), driven, None) for driven in range(num_driven)]
    if world_size == 1:
        return [LocalCommunicator()]
    assert directory is not None, "several processes meet in a directory"
    store = dist.FileStore(str(directory / "rendezvous"), world_size)  # type: ignore[attr-defined]
    return [runtime.communicator(range(world_size), rank, store)]


def _eos_ids(hf_config: Mapping[str, Any], generation: Mapping[str, Any]) -> frozenset[int]:
    """Ids that end an answer: the generation config's, else the model's."""
    ids = generation.get("eos_token_id", hf_config.get("eos_token_id"))
    return frozenset([ids] if isinstance(ids, int) else ids or [])
