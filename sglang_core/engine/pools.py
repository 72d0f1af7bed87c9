"""The pools of a rank: which its model asks for, how many pages of each fit, and the memory itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sglang_core.backend.communicator import Communicator
from sglang_core.backend.interface import DeviceRuntime
from sglang_core.backend.kv_dtypes import KV_DTYPES
from sglang_core.backend.pool import PoolSpec
from sglang_core.engine.resolve import Resolved, required, scheduler_config
from sglang_core.errors import ConfigError
from sglang_core.layers.causal_lm import CausalLM
from sglang_core.layers.forward_batch import AnyPool, AnyPoolSpec
from sglang_core.scheduler.state_slots import num_state_slots
from sglang_core.types import PoolGroup
from sglang_core.weights.pool_sizes import PoolSizes


def pool_specs(resolved: Resolved, model: CausalLM) -> dict[PoolGroup, AnyPoolSpec]:
    return model.pool_specs(resolved.page_size, KV_DTYPES[resolved.config.cache.kv_cache_dtype])


def alloc_pool(runtime: DeviceRuntime, spec: AnyPoolSpec, num_pages: int) -> AnyPool:
    if isinstance(spec, PoolSpec):
        return runtime.alloc_pool(spec, num_pages)
    return runtime.alloc_state_pool(spec, num_pages)


def pool_sizes(resolved: Resolved, specs: Mapping[PoolGroup, AnyPoolSpec]) -> PoolSizes:
    config, cached = scheduler_config(resolved), not resolved.config.cache.disable_radix_cache
    return PoolSizes(
        specs=specs,
        page_size=config.page_size,
        context_length=config.context_length,
        max_running=config.max_running,
        tokens_in_flight=config.max_in_flight * config.token_budget,
        states_per_req=num_state_slots(config.max_in_flight, cached=cached) + cached,
    )


def main_pages(resolved: Resolved, runtime: DeviceRuntime, sizes: PoolSizes, processes: Communicator) -> int:
    """Pages of the main pool, scratch not counted: what was asked for, else what fits, never more than could be used."""
    settled, page_size = resolved.config, resolved.page_size
    memory = runtime.memory()
    budget = int(memory.free - (1 - required(settled.cache.mem_fraction_static)) * memory.total)
    fits = sizes.fitting(budget)
    if settled.cache.max_total_tokens is not None:
        pages = -(-settled.cache.max_total_tokens // page_size)
        if pages > fits:
            raise ConfigError(
                f"max_total_tokens={settled.cache.max_total_tokens} needs {sizes.nbytes(pages) / 2**30:.2f} GiB of KV pool and "
                f"{max(budget, 0) / 2**30:.2f} GiB are left; lower it, or raise --mem-fraction-static"
            )
    else:
        pages = min(fits, sizes.useful())
    if pages < 1:
        raise ConfigError(
            f"no room for a KV pool: {memory.free / 2**30:.2f} GiB of {memory.total / 2**30:.2f} GiB are free after loading; "
            "raise --mem-fraction-static, lower --context-length, or free memory"
        )
    if processes.size > 1 and settled.cache.max_total_tokens is None:
        # Every rank must use the same page ids: take the smallest.
        agreed = torch.tensor([-pages], dtype=torch.int64)
        gathered = processes.all_gather(agreed.to(runtime.torch_device), dim=0).cpu()
        pages = -int(gathered.max())
    return pages
